"""The data that paged attention works on: pages, new tokens and heads."""

from dataclasses import dataclass, field

import jax
from jax import Array
from jaxtyping import Float, Int

from jmoe_kernels.paged_attention.one_byte import PageCode, code_of
from jmoe_kernels.settings import Span


@dataclass(frozen=True)
class PageLayout:
    """The layout of one layer's keys and values in arrays, whose first axis is the pages and whose last is d.

    num_arrays: number of arrays.
    heads_axis: axis of the heads, 1 or 2; the rows of a page are on the other one.
    num_entries: number of entries on the heads' axis per key-value head.
    """

    num_arrays: int
    heads_axis: int
    num_entries: int

    def shapes(self, pages: int, kv_heads: int, size: int, dim: int) -> tuple[tuple[int, ...], ...]:
        """Returns the shape of every array, for pages of ``size`` rows."""
        middle = (self.num_entries * kv_heads, size)
        return ((pages, *(middle if self.heads_axis == 1 else middle[::-1]), dim),) * self.num_arrays


APART = PageLayout(num_arrays=2, heads_axis=1, num_entries=1)
JOINED = PageLayout(num_arrays=1, heads_axis=2, num_entries=2)
LATENT = PageLayout(num_arrays=1, heads_axis=1, num_entries=1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerPages:
    """One layer's keys and values in the layout of the implementation that reads them.

    kv: arrays of one of three layouts. ``APART``: keys and values, each ``[P, G, S, d]``. ``JOINED``: one
        array ``[P, S, 2 * G, d]`` in which the value of a head follows its key. ``LATENT``: one array
        ``[P, G, S, d]`` whose rows are keys and values at once, as DeepSeek's latent attention keeps them
        (https://arxiv.org/abs/2405.04434, section 2.1). Numbers are float32, bfloat16 (also as uint16),
        int8 or e4m3 (also as uint8).
    scales: float32 scale of each row of the arrays of ``kv``, ``[P, G, S]``; None if they have no scales.
    """

    kv: tuple[Array, ...]
    scales: tuple[Array, ...] | None = None

    @property
    def code(self) -> PageCode | None:
        """Code of the numbers; None if they are not quantised."""
        return code_of(self.kv[0])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NewTokens:
    """The tokens of a step: their queries, keys and values, and their positions.

    q_BTHd: queries; scores are scaled by ``d**-0.5``.
    k_BTGd: keys.
    v_BTGd: values; None for latent pages, where a token's value is its key and the caller takes those columns
        of the output that it means.
    positions_BT: positions in the sequence; -1 marks padding. A row has one token, or a run that starts on a
        page boundary and whose length is a multiple of the page size (rows past its end are overwritten
        later, and no query attends to them before that).
    table_BM: pages of each sequence, in order.
    """

    q_BTHd: Float[Array, "B T H d"]
    k_BTGd: Float[Array, "B T G d"]
    v_BTGd: Float[Array, "B T G d"] | None
    positions_BT: Int[Array, "B T"]
    table_BM: Int[Array, "B M"]


@dataclass(frozen=True)
class Heads:
    """One rank's heads, and what attention over them needs.

    num_query_heads: number of query heads.
    num_kv_heads: number of key-value heads.
    head_dim: dimension of a head.
    span: the keys that a query sees.
    has_sinks: whether each query head has a logit of its own in the softmax's denominator.
    value_dim: number of columns of a row that are its value if pages are latent; None if keys and values lie
        apart.
    code: code in which pages keep the numbers; None if they are not quantised.
    """

    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    span: Span = field(default_factory=Span)
    has_sinks: bool = False
    value_dim: int | None = None
    code: PageCode | None = None


def beyond_windows(heads: Heads) -> str | None:
    """Returns what these heads need beyond causal attention within a window, or None."""
    if heads.span.chunk is not None:
        return "attention within chunks is not supported"
    if heads.has_sinks:
        return "attention sinks are not supported"
    return "latent pages are not supported" if heads.value_dim is not None else None
