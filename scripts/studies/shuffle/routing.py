"""Collects the bundled model's routing on text by domain, profiles it and applies placements to it.

The function that serving uses (``jmoe.moe.orders.align``) puts tokens on ranks, layer by layer. Every rank
takes an equal chunk of a step, and all steps have one size.
"""

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jmoe.checkpoint.identity import model_identity
from jmoe.engine.build import build_engine
from jmoe.engine.deployment.settings import EngineSettings
from jmoe.moe.orders import Hints, ShuffleTables, align, expected_shares, majority_rank, step_tables
from jmoe.placement.profile import Profile
from jmoe.placement.profile_builder import ProfileBuilder, RoutedRequest, nearest_seen
from jmoe.placement.tabulate import tabulate
from jmoe.tools.data import read_documents
from jmoe.tools.profile import routed

WINDOW = 256
CHARACTERS = 4 * WINDOW  # characters of a piece of text, more than most windows need

Routed = dict[str, list[RoutedRequest]]  # by domain


@dataclass(frozen=True)
class RoutingSource:
    """The routing of a model on some texts, and what a profile of it needs.

    domains: routed requests by domain.
    identity: identity of the model.
    sizes: numbers of layers and experts of the model, its top k and its vocabulary.
    embeddings_VD: model's embeddings.
    """

    domains: Routed
    identity: str
    sizes: dict[str, int]
    embeddings_VD: Float[np.ndarray, "V D"]

    def profile(self, domains: Iterable[str]) -> Profile:
        builder = ProfileBuilder(**self.sizes)
        for domain in domains:
            for request in self.domains[domain]:
                builder.add(request)
        return builder.finish(self.identity, nearest_seen(self.embeddings_VD, builder.seen_V))

    def test(self, domains: Iterable[str], seed: int = 0) -> "Test":
        """Returns the tokens of these domains, mixed as a decode step of many sequences mixes them."""
        requests = [request for domain in domains for request in self.domains[domain]]
        ids_N = np.concatenate([request.tokens_N for request in requests])
        order_N = np.random.default_rng(seed).permutation(len(ids_N))
        chosen_LNK = np.concatenate([request.ids_LNK for request in requests], axis=1)
        return Test(ids_N[order_N], chosen_LNK[:, order_N])


def domains_of(folder: Path) -> list[str]:
    return sorted(path.name.removesuffix(".txt.xz") for path in folder.glob("*.txt.xz"))


def pieces(path: Path, count: int) -> list[str]:
    """Returns ``count`` pieces of a file's text at even distances."""
    text = "\n\n".join(read_documents(path))
    starts = np.linspace(0, max(0, len(text) - CHARACTERS), count).astype(int)
    return [text[start : start + CHARACTERS] for start in starts]


def collect(model: str, folder: Path, windows: int) -> RoutingSource:
    """Returns the routing of ``windows`` windows of every domain in ``folder``."""
    how = EngineSettings(max_num_seqs=8, max_model_len=WINDOW, dtype="float32")
    with closing(build_engine(model, how, warm_up=False)) as engine:
        runner, cfg, codec = engine.runner, engine.runner.cfg, engine.codec
        assert codec is not None
        found: Routed = {}
        for domain in domains_of(folder):
            texts = pieces(folder / f"{domain}.txt.xz", windows)
            source = (codec.encode(text)[:WINDOW] for text in texts)
            found[domain] = list(routed(runner, source, 8))
        sizes = {
            "layers": cfg.num_hidden_layers, "experts": cfg.num_experts,
            "k": cfg.num_experts_per_tok, "vocab": cfg.vocab_size,
        }  # fmt: skip
        embeddings_VD = np.asarray(runner.model.embed[...]).astype(np.float32)
        return RoutingSource(found, model_identity(runner.model), sizes, embeddings_VD)


# ---- a placement on test tokens


@dataclass(frozen=True)
class Test:
    """The tokens on which a placement is tested.

    ids_N: ids of N tokens, in the order in which steps take them.
    chosen_LNK: experts of each token at every layer.
    """

    ids_N: Int[np.ndarray, " N"]
    chosen_LNK: Int[np.ndarray, "L N K"]

    def unseen(self, profile: Profile) -> float:
        """Returns the share of tokens whose id is not in the profile."""
        return float((profile.frequency_V[self.ids_N] == 0).mean())


@partial(jax.jit, static_argnames=("ranks", "size"))
def _ranks(
    tables: list[ShuffleTables], ids_N: jax.Array, rank_LNK: jax.Array, *, ranks: int, size: int
) -> jax.Array:
    """Returns the rank of each token at every layer, ``[L, N]``, in steps of ``size``."""
    valid_T, history, ranks_by_layer = jnp.ones(size, bool), [], []
    for table, rank_NK in zip(tables, rank_LNK, strict=True):
        share_NR = expected_shares(Hints.make(table, history), ids_N)
        order = jax.lax.map(
            lambda share_TR: align(share_TR, valid_T).row_N, share_NR.reshape(-1, size, ranks)
        )
        ranks_by_layer.append(order.reshape(-1) // (size // ranks))
        history.append(majority_rank(rank_NK, 1, ranks))
    return jnp.stack(ranks_by_layer)


def shuffled_ranks(
    tables: list[ShuffleTables], test: Test, home_LE: np.ndarray, ranks: int, size: int
) -> np.ndarray:
    """Returns the rank of each token at every layer, ``[L, N]``. N is cut to whole steps."""
    n = len(test.ids_N) // size * size
    expert_rank_LNK = on_ranks(test, home_LE)[:, :n].astype(np.int32)
    return np.asarray(_ranks(tables, test.ids_N[:n], expert_rank_LNK, ranks=ranks, size=size))


def on_ranks(test: Test, home_LE: np.ndarray) -> Int[np.ndarray, "L N K"]:
    """Returns the rank of every token's experts."""
    return np.stack([home_E[ids_NK] for home_E, ids_NK in zip(home_LE, test.chosen_LNK, strict=True)])


def dealt_ranks(layers: int, tokens: int, ranks: int, size: int) -> Int[np.ndarray, "L N"]:
    """Returns ranks without tables: each gets the next chunk of the step, as in a plain reduce-scatter."""
    step_T = np.repeat(np.arange(ranks), size // ranks)
    return np.tile(np.tile(step_T, tokens // size), (layers, 1))


def rates(expert_rank_LNK: Int[np.ndarray, "L N K"], rank_LN: Int[np.ndarray, "L N"]) -> dict[str, float]:
    """Returns the rates of a placement of tokens.

    local: share of activations that are on their token's rank.
    pairs: mean number of distinct other ranks that a token needs.
    """
    expert_rank_LNK = expert_rank_LNK[:, : rank_LN.shape[1]]
    own_LNK = expert_rank_LNK == rank_LN[..., None]
    ordered_LNK = np.sort(expert_rank_LNK, axis=2)
    distinct_LN = 1 + (np.diff(ordered_LNK, axis=2) != 0).sum(2)
    return {"local": float(own_LNK.mean()), "pairs": float((distinct_LN - own_LNK.any(2)).mean())}


def oracle_tables(expert_rank_LNK: np.ndarray, size: int, ranks: int) -> dict[str, float]:
    """Returns the local shares that are possible if every token's experts are known.

    equal: share with equal chunks, by ``align``.
    free: share with every token on its best rank.
    """
    counts_LNR = (expert_rank_LNK[..., None] == np.arange(ranks)).sum(2)
    n = counts_LNR.shape[1] // size * size
    align_all = jax.jit(lambda s: jax.lax.map(lambda x: align(x, jnp.ones(size, bool)).row_N, s))
    chunks = counts_LNR[:, :n].reshape(-1, size, ranks).astype(np.int32)
    rank_LN = np.asarray(align_all(chunks)).reshape(len(expert_rank_LNK), n) // (size // ranks)
    return {
        "equal": rates(expert_rank_LNK, rank_LN)["local"],
        "free": float(counts_LNR.max(2).mean() / expert_rank_LNK.shape[2]),
    }


def peak(expert_rank_LNK: np.ndarray, ranks: int) -> float:
    """Returns the load's maximum over its mean over ranks, as a mean over layers."""
    loads = np.stack([np.bincount(where.ravel(), minlength=ranks) for where in expert_rank_LNK])
    return float((loads.max(1) / loads.mean(1)).mean())


def figures(
    profile: Profile, home_LE: np.ndarray, ranks: int, test: Test, singles: Sequence[Test],
    sizes: Sequence[int], history: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Returns the figures of ``test`` under the placement with the profile's tables.

    profile: profile from which the tables are made.
    home_LE: rank of each expert.
    ranks: number of ranks.
    test: test tokens.
    singles: test tokens of each domain alone.
    sizes: sizes of a step.
    history: whether the history and the oracle are measured too.
    """
    tables = tabulate(profile, home_LE, ranks)
    expert_rank_LNK = on_ranks(test, home_LE)
    layers, tokens, _ = expert_rank_LNK.shape
    steps = {}
    for size in sizes:
        rank_LN = shuffled_ranks(step_tables(tables, history=False), test, home_LE, ranks, size)
        steps[str(size)] = {
            "tables": rates(expert_rank_LNK, rank_LN),
            "dealt": rates(expert_rank_LNK, dealt_ranks(layers, tokens, ranks, size)),
        }
        if history:
            rank_LN = shuffled_ranks(step_tables(tables, history=True), test, home_LE, ranks, size)
            steps[str(size)]["history"] = rates(expert_rank_LNK, rank_LN)
            steps[str(size)]["oracle"] = oracle_tables(expert_rank_LNK, size, ranks)
    return {
        "steps": steps,
        "peak": peak(expert_rank_LNK, ranks),
        "peak_single": float(np.mean([peak(on_ranks(one, home_LE), ranks) for one in singles])),
    }
