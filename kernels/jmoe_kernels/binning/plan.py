"""The tiles of a call of a binning kernel, and the differences between its two lowerings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jax import Array, lax
from jax.experimental import pallas as pl

Ref = Any  # a view of an array in memory
TILE = 8192  # numbers in a tile: 8 vector registers of float32 on TPU, 32 of each of 256 threads on GPU


@dataclass(frozen=True)
class Plan:
    """The sizes of a call.

    tokens: number of tokens of the batch.
    experts: number of experts.
    k: number of experts that a token chooses.
    rows: number of tokens with padding, a multiple of ``chunk``.
    lanes: number of experts with padding.
    chunk: number of tokens of a tile.

    rows, lanes and chunk are powers of two or multiples of one, because Triton's tiles are; 16 is the least
    that its products take.
    """

    tokens: int
    experts: int
    k: int
    rows: int
    lanes: int
    chunk: int

    @staticmethod
    def make(tokens: int, experts: int, k: int, least_lanes: int) -> "Plan":
        """Returns the plan with at least ``least_lanes`` lanes, and tiles of about ``TILE`` numbers."""
        lanes = max(least_lanes, pl.next_power_of_2(experts))
        chunk = max(16, min(pl.next_power_of_2(tokens), TILE // lanes))
        return Plan(tokens, experts, k, pl.cdiv(tokens, chunk) * chunk, lanes, chunk)

    def over_tiles(self, step: Callable, carry: Any) -> Any:
        """Runs ``carry = step(first token, carry)`` for every tile and returns the last carry."""
        if self.rows == self.chunk:
            return step(0, carry)

        def run_tile(i: Array, carry: Any) -> Any:
            return step(pl.multiple_of(i * self.chunk, self.chunk), carry)

        return lax.fori_loop(0, self.rows // self.chunk, run_tile, carry)


@dataclass(frozen=True)
class Lowering:
    """The parts of a kernel in which the lowerings differ.

    call: ``pl.pallas_call`` with the lowering's own arguments.
    barrier: function to call between two passes if one reads what the other wrote.
    least_lanes: smallest number of lanes of a tile.
    pairs: number of pairs of experts that are compared at once.
    spare: number of elements after the end of the rows that ``scatter`` and ``order`` write to.
    scatter: function (ref, first, value_TE, place_TE, k) that does ``ref[first + t, place] = value`` for
        every choice.
    order: function (ref, first, slot_TE, place_TE, k) that does ``ref[0, slot] = (first + t) * k + place``
        for every choice.

    In both, slots and values mean nothing where the place is k.
    """

    call: Callable
    barrier: Callable[[], None]
    least_lanes: int
    pairs: int
    spare: int
    scatter: Callable[[Ref, Array | int, Array, Array, int], None]
    order: Callable[[Ref, Array | int, Array, Array, int], None]


def cost(tokens: int, experts: int, k: int) -> pl.CostEstimate:
    """Returns the compiler's estimate of a call: 2 k rounds over the logits, pairs of experts, the arrays."""
    return pl.CostEstimate(
        flops=tokens * experts * 20 * k + 20 * experts * experts,
        transcendentals=tokens * experts,
        bytes_accessed=4 * tokens * (4 * experts + 5 * k),
    )
