"""In which order a layer's tokens should lie on the ranks, guessed before its gate has run.

Source: Li et al., "Speculative MoE" / "Semantic Parallelism" (arXiv 2503.04398), the online half. Two tables
tell: what share of a token id's assignments fell on each rank when profiled, and the same by the ranks that
the token went to in the two layers before.

Every rank must get equally many rows. Tokens ask for their best rank, the surest first; those that find no
room ask for the best rank with room left, until all are placed; padding comes last. All ranks of a data group
reckon the same order from what they all know. The paper leaves this step open, as well as the label of a
token that went to several ranks: here the rank of most of its experts, the lower of equals.

Who deals rows by an order is ``jmoe.moe.shuffle``. Offline: ``jmoe profile``, ``jmoe place``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Int, UInt8

from jmoe.placement.tables import Tables

LOOK_BACK = 2  # layers whose ranks tell where a token goes next


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ShuffleTables:
    """One layer's guesses, in 255ths of a token's assignments expected on each of R ranks.

    by_token_VR: by token id. by_history_HR: by the ranks of the two layers before, ``older * R + newer``;
    None goes by the token id alone, as the first two layers always do.
    """

    by_token_VR: UInt8[Array | np.ndarray, "V R"]
    by_history_HR: UInt8[Array | np.ndarray, "H R"] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hints:
    """What a layer's order is guessed from: its tables, and the ranks that each token went to in the two
    layers before, the older first; None in the first two."""

    tables: ShuffleTables
    history_N2: Int[Array, "N 2"] | None

    @classmethod
    def make(cls, tables: ShuffleTables, been: list[Array]) -> "Hints":
        """been: ``[N]`` of every layer so far."""
        knows = tables.by_history_HR is not None and len(been) >= LOOK_BACK
        return cls(tables, jnp.stack(been[-LOOK_BACK:], axis=1) if knows else None)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Order:
    """Which token each row of a data group is, rank after rank, and which row each token is."""

    token_N: Int[Array, " N"]
    row_N: Int[Array, " N"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Move:
    """The order that rows come in, and the one that they go on in."""

    before: Order
    after: Order


def step_tables(tables: Tables, *, history: bool) -> list[ShuffleTables]:
    """The tables of a placement as the step reads them, one a layer."""
    by_token = _shares(tables.shares_LVR, tables.ranks_LV, tables.confidence_LV, tables.count)
    by_history: Any = [None] * len(by_token)
    if history:
        following = tables.next_shares_LHR, tables.next_ranks_LH, tables.next_confidence_LH
        by_history = _shares(*following, tables.count)
    return [ShuffleTables(*both) for both in zip(by_token, by_history, strict=True)]


def prompt_share(tables: Tables, *, groups: int) -> Callable[[list[int]], list[float]]:
    """What part of a prompt's assignments is expected on each rank: R of them in each of ``groups``."""
    shares_LVR = _shares(tables.shares_LVR, tables.ranks_LV, tables.confidence_LV, tables.count)
    share_VR = np.asarray(np.mean(shares_LVR, axis=0, dtype=np.float32) / 255)

    def share(prompt: list[int]) -> list[float]:
        return share_VR[prompt].mean(axis=0).tolist() * groups

    return share


def _shares(
    shares_LXR: np.ndarray | None, ranks_LX: np.ndarray, confidence_LX: np.ndarray, ranks: int
) -> UInt8[np.ndarray, "L X R"]:
    """In 255ths; where only the best rank is known, the others have none."""
    if shares_LXR is None:
        shares_LXR = np.eye(ranks, dtype=np.float32)[ranks_LX] * confidence_LX[..., None]
    return np.rint(255 * np.asarray(shares_LXR, np.float32)).astype(np.uint8)


def guess(hints: Hints, ids_N: Int[Array, " N"]) -> Int[Array, "N R"]:
    """How much of each token is expected on each rank, by the surer of the two tables."""
    share_NR = jnp.asarray(hints.tables.by_token_VR)[ids_N].astype(jnp.int32)
    if hints.history_N2 is None or hints.tables.by_history_HR is None:
        return share_NR
    key_N = hints.history_N2[:, 0] * share_NR.shape[1] + hints.history_N2[:, 1]
    other_NR = jnp.asarray(hints.tables.by_history_HR)[key_N].astype(jnp.int32)
    surer_N1 = jnp.max(other_NR, axis=1, keepdims=True) > jnp.max(share_NR, axis=1, keepdims=True)
    return jnp.where(surer_N1, other_NR, share_NR)


def align(share_NR: Int[Array, "N R"], valid_N: Bool[Array, " N"]) -> Order:
    """The order in which each rank has N / R rows and tokens the ranks that expect most of them."""
    n, ranks = share_NR.shape
    share_NR = jnp.where(valid_N[:, None], share_NR, -1)

    def ask(rank_N: Array) -> Array:
        waiting_N = rank_N == ranks
        room_R = n // ranks - jnp.bincount(rank_N, length=ranks).astype(jnp.int32)
        open_NR = jnp.where(room_R[None] > 0, share_NR, -2)
        best_N = jnp.where(waiting_N, jnp.argmax(open_NR, axis=1).astype(jnp.int32), ranks)
        keys = best_N, -jnp.max(open_NR, axis=1), jnp.arange(n, dtype=jnp.int32)
        asked_N, _, token_N = lax.sort(keys, num_keys=3, is_stable=False)
        sizes_R = jnp.bincount(asked_N, length=ranks).astype(jnp.int32)
        turn_N = jnp.arange(n, dtype=jnp.int32) - _at(jnp.cumsum(sizes_R) - sizes_R, asked_N)
        admitted_N = turn_N < _at(room_R, asked_N)
        return rank_N.at[token_N].set(jnp.where(admitted_N, asked_N, rank_N[token_N]))

    nowhere_N = jnp.full(n, ranks, jnp.int32)
    rank_N = lax.while_loop(lambda rank_N: jnp.any(rank_N == ranks), ask, nowhere_N)
    token_N = lax.sort(rank_N * n + jnp.arange(n, dtype=jnp.int32), is_stable=False) % n
    row_N = jnp.zeros(n, jnp.int32).at[token_N].set(jnp.arange(n, dtype=jnp.int32), unique_indices=True)
    return Order(token_N, row_N)


def _at(values_R: Array, index_N: Array) -> Array:
    return jnp.take(values_R, index_N, mode="fill", fill_value=0)


def label(ids_TK: Int[Array, "T K"], held: int, ranks: int) -> Int[Array, " T"]:
    """The rank that holds most of each token's experts, of ``held`` a rank; the lower of equals."""
    votes_TKR = (ids_TK // held)[:, :, None] == jnp.arange(ranks)[None, None]
    return jnp.argmax(jnp.sum(votes_TKR, axis=1), axis=1).astype(jnp.int32)
