"""How a binning kernel is cut into tiles, and what the lowerings that it is written for differ in."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jax import Array, lax
from jax.experimental import pallas as pl

Ref = Any  # a view of an array in memory
TILE = 8192  # numbers in a tile: 8 vector registers of float32 on TPU, 32 of each of 256 threads on GPU


@dataclass(frozen=True)
class Plan:
    """Sizes of a call: tokens, experts and k as given; rows and lanes: padded; chunk: tokens of a tile.

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
    def of(tokens: int, experts: int, k: int, least_lanes: int) -> "Plan":
        """The plan with at least ``least_lanes`` lanes, and tiles of about ``TILE`` numbers."""
        lanes = max(least_lanes, pl.next_power_of_2(experts))
        chunk = max(16, min(pl.next_power_of_2(tokens), TILE // lanes))
        return Plan(tokens, experts, k, pl.cdiv(tokens, chunk) * chunk, lanes, chunk)

    def over_tiles(self, step: Callable, carry: Any) -> Any:
        """``carry = step(first token, carry)`` for every tile."""
        if self.rows == self.chunk:
            return step(0, carry)

        def at(i: Array, carry: Any) -> Any:
            return step(pl.multiple_of(i * self.chunk, self.chunk), carry)

        return lax.fori_loop(0, self.rows // self.chunk, at, carry)


@dataclass(frozen=True)
class Platform:
    """What the lowerings differ in.

    call: ``pl.pallas_call`` with the lowering's own arguments. barrier: between passes, of which one reads
    what another wrote. pairs: of experts compared at once. scatter(ref, first, value_TE, place_TE, k):
    ``ref[first + t, place] = value`` for every choice; order(ref, first, slot_TE, place_TE, k):
    ``ref[0, slot] = (first + t) * k + place``. Where ``place`` is k, ``slot`` and ``value`` mean nothing.
    spare: elements past the end of the rows of both.
    """

    call: Callable
    barrier: Callable[[], None]
    least_lanes: int
    pairs: int
    spare: int
    scatter: Callable[[Ref, Array | int, Array, Array, int], None]
    order: Callable[[Ref, Array | int, Array, Array, int], None]


def cost(tokens: int, experts: int, k: int) -> pl.CostEstimate:
    """What the compiler is told of one call: 2 k rounds over the logits, pairs of experts, and the arrays."""
    return pl.CostEstimate(
        flops=tokens * experts * 20 * k + 20 * experts * experts,
        transcendentals=tokens * experts,
        bytes_accessed=4 * tokens * (4 * experts + 5 * k),
    )
