"""What paged attention works on.

A sequence's page table lists its pages in order; position p lives in row ``p % page size`` of page
``table[p // page size]``. Letters: B sequences, T tokens of each, H query heads, G key-value heads, d head
dimension, P pages, S rows of a page, M pages of a table.
"""

from dataclasses import dataclass

import jax
from jax import Array
from jaxtyping import Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerPages:
    """One layer's keys and values in the layout of the implementation that reads them.

    kv: keys and values apart, each ``[P, G, S, d]``; or joined, one array ``[P, S, 2 * G, d]`` in which the
    value of a head follows its key.
    """

    kv: tuple[Array, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NewTokens:
    """The tokens of a step: their queries, keys and values, and where they stand.

    positions_BT: -1 marks padding. One token a sequence, or a run that starts on a page boundary and whose
    length is a multiple of the page size (rows past its end are overwritten later, and no query attends to
    them before).
    """

    q_BTHd: Float[Array, "B T H d"]
    k_BTGd: Float[Array, "B T G d"]
    v_BTGd: Float[Array, "B T G d"]
    positions_BT: Int[Array, "B T"]
    table_BM: Int[Array, "B M"]


@dataclass(frozen=True)
class Heads:
    """One rank's heads: of queries, of keys and values, their dimension; window: see ``ModelConfig``."""

    query: int
    kv: int
    dim: int
    window: int | None = None
