"""What paged attention works on: pages, new tokens, heads and spans."""

from dataclasses import dataclass
from typing import TypeVar

import jax
from jax import Array
from jaxtyping import Float, Int

Position = TypeVar("Position", int, Array)


@dataclass(frozen=True)
class Span:
    """The keys that a query sees, of those that causality allows; all of them if neither field is set.

    window: number of keys up to the query's own, which counts: itself and the ``window - 1`` tokens before.
    chunk: number of positions of a chunk; a query sees the keys of its own chunk, for which the position
        divided by ``chunk`` is the same (Llama 4's chunked attention).
    Raises ValueError if both are set, or if one is less than 1 token.
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
        """Returns the first position that a query at ``position`` sees; it may be below 0 for a window."""
        if self.window is not None:
            return position - (self.window - 1)
        return position * 0 if self.chunk is None else position // self.chunk * self.chunk


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerPages:
    """One layer's keys and values in the layout of the implementation that reads them.

    kv: arrays of one of three layouts. Apart: keys and values, each ``[P, G, S, d]``. Joined: one array
        ``[P, S, 2 * G, d]`` in which the value of a head follows its key. Latent: one array ``[P, G, S, d]``
        whose rows are keys and values at once, as DeepSeek's latent attention keeps them
        (https://arxiv.org/abs/2405.04434, section 2.1).
    """

    kv: tuple[Array, ...]


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

    query: number of query heads.
    kv: number of key-value heads.
    dim: dimension of a head.
    span: which keys a query sees.
    sinks: whether each query head has a logit of its own in the softmax's denominator.
    latent: number of columns of a row that are its value if pages are latent; None if keys and values lie
        apart.
    """

    query: int
    kv: int
    dim: int
    span: Span = Span()
    sinks: bool = False
    latent: int | None = None


def beyond_windows(heads: Heads) -> str | None:
    """Returns what these heads need beyond causal attention within a window, or None."""
    if heads.span.chunk is not None:
        return "attention within chunks is not supported"
    if heads.sinks:
        return "attention sinks are not supported"
    return "latent pages are not supported" if heads.latent is not None else None
