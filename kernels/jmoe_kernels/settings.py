"""The settings of a model or a layer that the kernels read. This module needs no jax."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:
    from jax import Array

Activation = Literal["silu", "gelu_tanh", "relu", "swiglu_oai"]
Activations = Literal["auto", "int8"]  # what the factor of a quantised weight is rounded to
BinningMethod = Literal["affinity", "oea", "budget", "popularity", "random"]
Position = TypeVar("Position", int, "Array")


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
