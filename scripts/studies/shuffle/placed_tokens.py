"""Puts test tokens on ranks as a placement with its tables does, and measures how many activations are local.

The function that serving uses (``jmoe.moe.orders.align``) puts tokens on ranks, layer by layer. Every rank
takes an equal chunk of a step, and all steps have one size.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from shared.text_routing import Test

from jmoe.moe.orders import Hints, ShuffleTables, align, expected_shares, majority_rank, step_tables
from jmoe.placement.profile import Profile
from jmoe.placement.tabulate import tabulate


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
