"""The order in which a layer's tokens should lie on the ranks, predicted before the layer's gate has run.

Source: Li et al., "Speculative MoE" / "Semantic Parallelism" (arXiv 2503.04398), the online half. The
prediction uses two tables: the share of a token id's assignments that went to each rank in the profile, and
the same share by the ranks that the token went to in the previous two layers.

Every rank must get the same number of rows. Tokens request their best rank, the surest tokens first; tokens
that find no room request the best rank that still has room, until all are placed; padding comes last. All
ranks of a data group compute the same order from data that they all have. The paper does not specify this
step, nor the label of a token that went to several ranks: here it is the rank of most of its experts, the
lower rank in a tie.

``jmoe.moe.shuffle`` moves the rows by an order. Offline commands: ``jmoe profile``, ``jmoe place``.
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

LOOK_BACK = 2  # number of previous layers whose ranks predict where a token goes next


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ShuffleTables:
    """One layer's predictions: the share of a token's assignments expected on each of R ranks, in 255ths.

    token_shares_VR: shares by token id.
    history_shares_HR: shares by the ranks of the previous two layers, at index ``older * R + newer``. None
        uses the token id alone, as the first two layers always do.
    """

    token_shares_VR: UInt8[Array | np.ndarray, "V R"]
    history_shares_HR: UInt8[Array | np.ndarray, "H R"] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hints:
    """The data from which a layer's order is predicted.

    tables: tables of the layer.
    history_N2: ranks that each token went to in the previous two layers, the older first; None in the first
        two layers and without a history table.
    """

    tables: ShuffleTables
    history_N2: Int[Array, "N 2"] | None

    @classmethod
    def make(cls, tables: ShuffleTables, history: list[Array]) -> "Hints":
        """Makes the hints of the next layer.

        history: tokens' ranks ``[N]`` in every layer so far.
        """
        knows = tables.history_shares_HR is not None and len(history) >= LOOK_BACK
        return cls(tables, jnp.stack(history[-LOOK_BACK:], axis=1) if knows else None)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Order:
    """An order of a data group's tokens on its ranks.

    token_N: token of each row, rank after rank.
    row_N: row of each token (the inverse).
    """

    token_N: Int[Array, " N"]
    row_N: Int[Array, " N"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Move:
    """The rows' order before a move and after it."""

    old_order: Order
    new_order: Order


def step_tables(tables: Tables, *, history: bool) -> list[ShuffleTables]:
    """Returns the tables of a placement in the form that the step reads, one per layer."""
    token_shares = _shares(tables.shares_LVR, tables.ranks_LV, tables.confidence_LV, tables.count)
    history_shares: Any = [None] * len(token_shares)
    if history:
        arrays = tables.next_shares_LHR, tables.next_ranks_LH, tables.next_confidence_LH
        history_shares = _shares(*arrays, tables.count)
    return [ShuffleTables(*pair) for pair in zip(token_shares, history_shares, strict=True)]


def prompt_share(tables: Tables, *, groups: int) -> Callable[[list[int]], list[float]]:
    """Returns a function from a prompt to the share of its assignments expected on each rank, for the R ranks
    of each of ``groups`` data groups."""
    shares_LVR = _shares(tables.shares_LVR, tables.ranks_LV, tables.confidence_LV, tables.count)
    share_VR = np.asarray(np.mean(shares_LVR, axis=0, dtype=np.float32) / 255)

    def share(prompt: list[int]) -> list[float]:
        return share_VR[prompt].mean(axis=0).tolist() * groups

    return share


def _shares(
    shares_LXR: np.ndarray | None, ranks_LX: np.ndarray, confidence_LX: np.ndarray, ranks: int
) -> UInt8[np.ndarray, "L X R"]:
    """Returns the shares in 255ths. If only the best rank is known, the other ranks have a share of 0."""
    if shares_LXR is None:
        shares_LXR = np.eye(ranks, dtype=np.float32)[ranks_LX] * confidence_LX[..., None]
    return np.rint(255 * np.asarray(shares_LXR, np.float32)).astype(np.uint8)


def expected_shares(hints: Hints, ids_N: Int[Array, " N"]) -> Int[Array, "N R"]:
    """Returns the share of each token expected on each rank, from the table that is surer for that token."""
    share_NR = jnp.asarray(hints.tables.token_shares_VR)[ids_N].astype(jnp.int32)
    if hints.history_N2 is None or hints.tables.history_shares_HR is None:
        return share_NR
    key_N = hints.history_N2[:, 0] * share_NR.shape[1] + hints.history_N2[:, 1]
    other_NR = jnp.asarray(hints.tables.history_shares_HR)[key_N].astype(jnp.int32)
    surer_N1 = jnp.max(other_NR, axis=1, keepdims=True) > jnp.max(share_NR, axis=1, keepdims=True)
    return jnp.where(surer_N1, other_NR, share_NR)


def align(share_NR: Int[Array, "N R"], valid_N: Bool[Array, " N"]) -> Order:
    """Returns the order in which each rank has N / R rows and tokens lie on the ranks with their largest
    shares, as far as there is room."""
    n, ranks = share_NR.shape
    share_NR = jnp.where(valid_N[:, None], share_NR, -1)

    def request_ranks(rank_N: Array) -> Array:
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
    rank_N = lax.while_loop(lambda rank_N: jnp.any(rank_N == ranks), request_ranks, nowhere_N)
    token_N = lax.sort(rank_N * n + jnp.arange(n, dtype=jnp.int32), is_stable=False) % n
    row_N = jnp.zeros(n, jnp.int32).at[token_N].set(jnp.arange(n, dtype=jnp.int32), unique_indices=True)
    return Order(token_N, row_N)


def _at(values_R: Array, index_N: Array) -> Array:
    return jnp.take(values_R, index_N, mode="fill", fill_value=0)


def majority_rank(ids_TK: Int[Array, "T K"], num_local: int, ranks: int) -> Int[Array, " T"]:
    """Returns the rank that holds most of each token's experts, with ``num_local`` experts per rank; in a tie
    it is the lower rank."""
    votes_TKR = (ids_TK // num_local)[:, :, None] == jnp.arange(ranks)[None, None]
    return jnp.argmax(jnp.sum(votes_TKR, axis=1), axis=1).astype(jnp.int32)
