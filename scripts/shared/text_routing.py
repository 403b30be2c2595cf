"""Collects a model's routing on text by domain, with what a profile of it needs."""

from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from jmoe import LLM
from jmoe.checkpoint.identity import model_identity
from jmoe.engine.build import build_engine
from jmoe.engine.deployment.settings import EngineSettings
from jmoe.placement.profile import Profile
from jmoe.placement.profile_builder import ProfileBuilder, RoutedRequest, nearest_seen
from jmoe.tools.data import read_documents
from jmoe.tools.profile import routed

WINDOW = 256
CHARACTERS = 4 * WINDOW  # characters of a piece of text, more than most windows need

Routed = dict[str, list[RoutedRequest]]  # by domain


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

    def test(self, domains: Iterable[str], seed: int = 0) -> Test:
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


def beginning(llm: LLM, text: str, tokens: int) -> list[int]:
    """Returns the first ``tokens`` tokens of a text. The text may be longer than the model's context."""
    assert llm.engine.codec is not None
    return llm.engine.codec.encode(text)[:tokens]


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
