"""What paged attention works on.

A sequence's page table lists its pages in order; position p lives in row ``p % page size`` of page
``table[p // page size]``. Letters: B sequences, T tokens of each, H query heads, G key-value heads, d head
dimension, P pages, S rows of a page, M pages of a table.
"""

from dataclasses import dataclass
from typing import TypeVar

import jax
from jax import Array
from jaxtyping import Float, Int

Position = TypeVar("Position", int, Array)


@dataclass(frozen=True)
class Span:
    """Which keys a query sees besides causality; all of them where neither is given, never both.

    window: itself and the ``window - 1`` tokens before. chunk: those of its own chunk, where the position
    divided by ``chunk`` is the same (Llama 4's chunked attention).
    """

    window: int | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        sizes = [size for size in (self.window, self.chunk) if size is not None]
        if len(sizes) == 2:
            raise ValueError(f"a span has a window ({self.window}) or a chunk ({self.chunk}), not both")
        if sizes and sizes[0] < 1:
            raise ValueError(f"a span's window or chunk must be at least 1 token, got {sizes[0]}")

    def first(self, position: Position) -> Position:
        """The first position that a query at ``position`` sees; below 0 where its window reaches past it."""
        if self.window is not None:
            return position - (self.window - 1)
        return position * 0 if self.chunk is None else position // self.chunk * self.chunk


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerPages:
    """One layer's keys and values in the layout of the implementation that reads them.

    kv: keys and values apart, each ``[P, G, S, d]``; or joined, one array ``[P, S, 2 * G, d]`` in which the
    value of a head follows its key; or latent, one array ``[P, G, S, d]`` whose rows are keys and values at
    once, as DeepSeek's latent attention keeps them (https://arxiv.org/abs/2405.04434, section 2.1).
    """

    kv: tuple[Array, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NewTokens:
    """The tokens of a step: their queries, keys and values, and where they stand.

    positions_BT: -1 marks padding. One token a sequence, or a run that starts on a page boundary and whose
    length is a multiple of the page size (rows past its end are overwritten later, and no query attends to
    them before). v_BTGd: None for latent pages, where the value of a token is its key; the caller takes
    the columns of the output that it means. Scores are scaled by ``d**-0.5``.
    """

    q_BTHd: Float[Array, "B T H d"]
    k_BTGd: Float[Array, "B T G d"]
    v_BTGd: Float[Array, "B T G d"] | None
    positions_BT: Int[Array, "B T"]
    table_BM: Int[Array, "B M"]


@dataclass(frozen=True)
class Heads:
    """One rank's heads: of queries, of keys and values, their dimension, and what attention over them takes.

    sinks: whether each query head has a logit of its own in the softmax's denominator. latent: columns of a
    row that are its value, where pages are latent; None where keys and values lie apart.
    """

    query: int
    kv: int
    dim: int
    span: Span = Span()
    sinks: bool = False
    latent: int | None = None


def beyond_windows(heads: Heads) -> str | None:
    """What these heads ask for beyond causal attention within a window, or None."""
    if heads.span.chunk is not None:
        return "attention within chunks is not supported"
    if heads.sinks:
        return "attention sinks are not supported"
    return "latent pages are not supported" if heads.latent is not None else None
