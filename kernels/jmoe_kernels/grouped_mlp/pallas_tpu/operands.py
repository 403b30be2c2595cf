"""The arrays of one call: rows in VMEM, and stacks of weights of which chunks are fetched."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jax import Array
from jax.experimental import pallas as pl

Ref = Any  # a Pallas reference: indexed and sliced as an array is


@dataclass(frozen=True)
class Stack:
    """A stack of weights, ``[experts, ...]``.

    array: its numbers.
    axis: axis of ``array`` that is cut into chunks of F; None fetches an expert's whole with each chunk.
    """

    array: Array
    axis: int | None

    def chunk_shape(self, steps: int) -> tuple[int, ...]:
        """Returns the shape of one of the ``steps`` chunks of an expert."""
        cut = enumerate(self.array.shape[1:], 1)
        return tuple(size // steps if axis == self.axis else size for axis, size in cut)

    def chunk_of(self, ref: Ref, e: Array, j: Array, steps: int) -> Ref:
        """Returns chunk ``j`` of expert ``e`` of the stack in HBM."""
        if self.axis is None:
            return ref.at[e]
        size = self.array.shape[self.axis] // steps
        return ref.at[(e, *[slice(None)] * (self.axis - 1), pl.ds(pl.multiple_of(j * size, size), size))]

    def block_spec(self, steps: int, expert: Callable[..., Array]) -> pl.BlockSpec:
        """Returns how a pipeline over (core, tile, chunk) fetches chunks.

        expert: function of the grid's indices and prefetched scalars that returns the tile's expert.
        """
        axes = range(1, self.array.ndim)

        def index(c: Array, i: Array, j: Array, *prefetched: Ref) -> tuple[Any, ...]:
            return expert(c, i, j, *prefetched), *(j if axis == self.axis else 0 for axis in axes)

        return pl.BlockSpec((None, *self.chunk_shape(steps)), index)


@dataclass(frozen=True)
class Operands:
    """The arrays of one call.

    rows: arrays of the rows by name: "x", and for quantised weights what ``codes.split_rows`` makes of it. A
        block of rows is as much of each array as the block is of the rows.
    stacks: stacks of weights by name: "gate_up", "down", their biases, scales and lows.
    num_rows: rows of the call, those past the last group too.
    dims: (experts, inner, model).
    """

    rows: dict[str, Array]
    stacks: dict[str, Stack]
    num_rows: int
    dims: tuple[int, int, int]

    def cost(self, expert_reads: int) -> pl.CostEstimate:
        """Returns what XLA's scheduler should assume: every row is used, and the weights of ``expert_reads``
        experts are read."""
        experts, f, d = self.dims
        weight_bytes = sum(stack.array.size * _bits(stack.array) // 8 for stack in self.stacks.values())
        row_bytes = sum(array.nbytes for array in self.rows.values()) + self.num_rows * d * 4
        return pl.CostEstimate(
            flops=6 * self.num_rows * d * f,
            transcendentals=self.num_rows * f,
            bytes_accessed=expert_reads * (weight_bytes // experts) + row_bytes,
        )


def _bits(array: Array) -> int:
    return 4 if array.dtype == "int4" else 8 * array.dtype.itemsize
