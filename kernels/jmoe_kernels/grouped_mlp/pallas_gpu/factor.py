"""Weights as the first factor of the decode kernels' products: plain, or decoded in registers.

wgmma takes its first factor from registers too. Codes are converted there, so that device and shared memory
see no other form of them. int8 and int4 become bfloat16 in about two instructions a number; e2m1 comes as
signed numbers, of which a few bfloat16 operations make its values; e4m3 becomes float16 and then float32.

Scales act in one of two places. "Late" ones multiply sums: those of whole rows at the end, those of groups at
the end of each group, which costs registers for one more tile of sums. "Early" scales, and lows, act on the
numbers in float32, which are then rounded to bfloat16; this is what portable XLA computes. Windows of many
rows have no registers for late groups, and lows are always early.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe_kernels.grouped_mlp.pallas_gpu.blocks import ACC
from jmoe_kernels.quantised import DTYPES, Coding, Quantised, Weight
from jmoe_kernels.quantised.tiles import TILE
from jmoe_kernels.settings import Activations

LATE_ROWS = 32  # the widest window whose groups are scaled late: wider ones spill
INT8_ROWS = 64  # the widest window of int8 rows whose groups are scaled
LEAST_INT8 = {"int8": 32, "iq4": 32, "int4": 64}  # numbers of a product with int8 rows
Parts = tuple[Any, ...]  # a weight's arrays, or their tiles: values, and perhaps scales and lows


@dataclass(frozen=True)
class Factor:
    """A weight as a kernel multiplies with it.

    coding: how it is stored; None is bfloat16.
    depth: length of its rows.
    step: step of the contraction, in numbers.
    rows: number of rows of a window.
    activations: what the rows may be rounded to (see ``has_int8_rows``).
    """

    coding: Coding | None
    depth: int
    step: int
    rows: int
    activations: Activations = "auto"

    @property
    def group(self) -> int:
        """Numbers of a row that share a scale, or the whole row."""
        return self.coding.group if self.coding and self.coding.group is not None else self.depth

    @property
    def piece(self) -> int:
        """Numbers of a row in a step that are multiplied at a time."""
        return self.step if self.coding is None or self._is_late_row else min(self.step, self.group)

    @property
    def has_int8_rows(self) -> bool:
        """Whether rows are rounded to int8, because that is wanted and codes are or become int8. A product
        then has 32 numbers at least, or 64 from registers, and sums of groups are always scaled."""
        coding, least = self.coding, LEAST_INT8.get(self.coding.code) if self.coding else None
        if self.activations != "int8" or coding is None or least is None or coding.has_lows:
            return False
        return self.group >= self.depth or (self.group % least == 0 and self.rows <= INT8_ROWS)

    @property
    def sums_dtype(self) -> Any:
        return jnp.int32 if self.has_int8_rows else jnp.float32

    @property
    def is_summed_by_group(self) -> bool:
        """Whether the sums of groups are scaled."""
        is_late = self.coding is not None and not self.coding.has_lows
        return is_late and self.group < self.depth and (self.rows <= LATE_ROWS or self.has_int8_rows)

    @property
    def _is_late_row(self) -> bool:
        return self.coding is not None and not self.coding.has_lows and self.group >= self.depth

    def specs(self, tile: Any) -> list[plgpu.BlockSpec]:
        """Returns the blocks of a step of a tile: those of the values, and of scales that a step needs."""
        values = plgpu.BlockSpec((TILE, self.step), lambda k: (tile, k))
        if self.coding is None or self._is_late_row:
            return [values]
        if self.group < self.step:
            scales = plgpu.BlockSpec((self.step // self.group, TILE), lambda k: (k, 0))
        else:
            scales = plgpu.BlockSpec((1, TILE), lambda k: (lax.div(k * self.step, self.group), 0))
        return [values, *[scales] * (1 + self.coding.has_lows)]

    def sources(self, arrays: Parts, e: Any, product: int, tile: Any) -> list[Any]:
        """Returns what ``specs`` cuts: references to the weight's rows, and to the scales of the tile."""
        values, *scales = arrays
        if self.coding is None or self._is_late_row:
            scales = ()
        return [values.at[e, product], *[s.at[e, product, tile] for s in scales]]

    def pieces(self, tiles: Parts) -> Iterator[tuple[int, Any]]:
        """Yields the first number of each piece of a step, and the piece as wgmma takes it."""
        values, *scales = tiles
        if self.coding is None:
            yield 0, values
            return
        if self.has_int8_rows:
            in_memory = values.dtype == jnp.int8
            codes = values if in_memory else values[...].astype(jnp.int8)
            for first in range(0, self.step, self.piece):
                end = first + self.piece
                if self.piece == self.step:
                    yield first, codes
                else:
                    yield first, codes.at[:, first:end] if in_memory else codes[:, first:end]
            return
        numbers = decoded(self.coding, values[...])
        for i in range(self.step // self.piece):
            part = numbers[:, i * self.piece : (i + 1) * self.piece] if self.piece < self.step else numbers
            if not (self.is_summed_by_group or self._is_late_row):
                part = part.astype(jnp.float32) * _along_rows(self.scale(scales[0][i]), part.shape)
                if self.coding.has_lows:
                    part = part + _along_rows(scales[1][i].astype(jnp.float32), part.shape)
            yield i * self.piece, _to_bfloat16(part)

    def scale(self, stored: Array) -> Array:
        """Returns 64 stored scales in float32, for numbers as ``decoded`` returns them."""
        assert self.coding is not None
        if self.coding.scales == "uint8":
            exponents = stored.astype(jnp.int32)
            bits = jnp.where(exponents == 0, 1 << 22, exponents << 23)
            scales = lax.bitcast_convert_type(bits, jnp.float32)
        else:
            scales = stored.astype(jnp.float32)
        return scales * 0.5 if self.coding.code == "e2m1" else scales

    def end(self, sums: Array, arrays: Parts, e: Any, product: int, tile: Any) -> Array:
        """Returns the finished sums ``[64, rows]``: those of whole rows take their scales."""
        if not self._is_late_row:
            return sums

        def load(scales_s, barrier):
            plgpu.copy_gmem_to_smem(arrays[1].at[e, product, tile], scales_s, barrier)
            plgpu.barrier_wait(barrier)
            return sums * _along_rows(self.scale(scales_s[0]), sums.shape)

        return pl.run_scoped(load, plgpu.SMEM((1, TILE), arrays[1].dtype), plgpu.Barrier())


def rounded(factor: Factor, rows: Array) -> tuple[Array, ...]:
    """Returns rows ``[..., depth]`` as the factor's product takes them: as they are, or as int8 with the unit
    of each row, float32 ``[...]``."""
    if not factor.has_int8_rows:
        return (rows,)
    rows = rows.astype(jnp.float32)
    largest = jnp.max(jnp.abs(rows), axis=-1)
    units = jnp.where(largest == 0, 1, largest / 127)
    return jnp.round(rows / units[..., None]).astype(jnp.int8), units


def times_units(sums: Array, units: Any) -> Array:
    """Returns sums ``[64, rows]`` times the units of ``rounded`` in device memory."""

    def load(units_s, barrier):
        plgpu.copy_gmem_to_smem(units, units_s, barrier)
        plgpu.barrier_wait(barrier)
        return sums * lax.broadcast_in_dim(units_s[...], sums.shape, (1,))

    return pl.run_scoped(load, plgpu.SMEM(units.shape, jnp.float32), plgpu.Barrier())


def arrays_of(weight: Weight) -> Parts:
    """Returns the arrays of weights ``[E, P, O, I]``, in the layout "tiles", as the kernels take them.

    Bytes get the dtype of their codes, which moves nothing on a GPU; scales and lows become
    ``[E, P, O / 64, groups, 64]``.
    """
    if not isinstance(weight, Quantised):
        return (weight,)
    values, code, (*front, out, groups) = weight.values, weight.coding.code, weight.scales.shape
    if code in ("int4", "e2m1"):
        values = lax.bitcast_convert_type(values, jnp.int4).reshape(weight.shape)
    elif code == "e4m3":
        values = lax.bitcast_convert_type(values, DTYPES["e4m3"])
    scales = [weight.scales, *([] if weight.lows is None else [weight.lows])]
    return (values, *[s.reshape(*front, out // TILE, groups, TILE) for s in scales])


def decoded(coding: Coding, codes: Array) -> Array:
    """Returns the numbers of codes exactly, in bfloat16 or, of e4m3, in float16; of e2m1 twice the numbers.

    An e2m1 number is stored as its place n among the numbers of its sign, from -7 to 7: n up to 4, then 6, 8
    and 12 of twice the numbers. So they are n, plus once what is above 4, plus twice what is above 6.
    """
    if coding.code == "e4m3":
        return codes.astype(jnp.float16)
    numbers = codes.astype(jnp.bfloat16)
    if coding.code != "e2m1":
        return numbers
    above = numbers - _within(numbers, 4)
    return numbers + above * 3 - _within(above, 2) * 2


def _within(numbers: Array, limit: float) -> Array:
    bound = jnp.asarray(limit, numbers.dtype)
    return jnp.maximum(jnp.minimum(numbers, bound), -bound)


def _to_bfloat16(numbers: Array) -> Array:
    if numbers.dtype == jnp.float16:  # Mosaic has no conversion from float16 to bfloat16
        numbers = numbers.astype(jnp.float32)
    return numbers.astype(jnp.bfloat16)


def _along_rows(vector: Array, shape: tuple[int, ...]) -> Array:
    return lax.broadcast_in_dim(vector, shape, (0,))


def contracted(
    factor: Factor, weights: list[list[Any]], tile: Any, rows: Any, stages: int, interpret: bool
) -> tuple[Array, ...]:
    """Returns the sums ``[64, rows]`` of each weight's tile times the rows of a window, in float32.

    weights: for each weight the references of ``Factor.sources``.
    rows: the rows ``[rows, depth]`` in device memory.
    stages: number of steps in flight.
    interpret: whether the interpreter runs it.
    """
    count = len(factor.specs(tile))

    def pipeline(body: Callable, **carry: Any) -> Any:
        row_spec = plgpu.BlockSpec((factor.rows, factor.step), lambda k: (0, k))
        return plgpu.emit_pipeline(
            body,
            grid=(factor.depth // factor.step,),
            in_specs=[row_spec, *factor.specs(tile) * len(weights)],
            max_concurrent_steps=stages,
            **carry,
        )(rows, *[reference for references in weights for reference in references])

    def split(blocks: tuple) -> list[Parts]:
        return [tuple(blocks[i : i + count]) for i in range(0, count * len(weights), count)]

    def by_group(multiply: Callable) -> tuple[Array, ...]:
        def contract(_, rows_s, *rest):
            *blocks, totals = rest
            return tuple(
                _add_groups(factor, tiles, total, partial(multiply, rows_s))
                for tiles, total in zip(split(tuple(blocks)), totals, strict=True)
            )

        zeros = jnp.zeros((TILE, factor.rows), jnp.float32)
        if not interpret:
            zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
        return pipeline(contract, init_carry=(zeros,) * len(weights))

    def at_once(multiply: Callable) -> tuple[Array, ...]:
        def accumulate(*accs):
            def contract(_, rows_s, *blocks):
                for acc, tiles in zip(accs, split(blocks), strict=True):
                    for start, numbers in factor.pieces(tiles):
                        multiply(rows_s, acc, numbers, start)
                plgpu.wgmma_wait(0)

            pipeline(contract)
            return tuple(acc[...].astype(jnp.float32) for acc in accs)

        return pl.run_scoped(accumulate, *[ACC((TILE, factor.rows), factor.sums_dtype)] * len(weights))

    run = by_group if factor.is_summed_by_group else at_once
    if not interpret:
        return run(partial(_multiply, factor))
    spares = plgpu.SMEM((TILE, factor.piece), rows.dtype), plgpu.SMEM((factor.piece, factor.rows), rows.dtype)
    return pl.run_scoped(lambda *spares: run(partial(_multiply_interpreted, factor, spares)), *spares)


def _multiply(factor: Factor, rows_s: Any, acc: Any, numbers: Any, start: int) -> None:
    """Adds a piece of a weight's tile times the same numbers of all rows to the sums; it does not wait."""
    is_whole = factor.piece == factor.step
    plgpu.wgmma(acc, numbers, (rows_s if is_whole else rows_s.at[:, pl.ds(start, factor.piece)]).T)


def _multiply_interpreted(
    factor: Factor, spares: tuple, rows_s: Any, acc: Any, numbers: Any, start: int
) -> None:
    """Does ``_multiply`` with factors in shared memory that are not transposed: jax 0.10's interpreter takes
    no others."""
    spare, transpose = spares
    spare[...] = numbers[...]
    transpose[...] = rows_s[...].T[start : start + factor.piece]
    plgpu.commit_smem()
    plgpu.wgmma(acc, spare, transpose)
    plgpu.wgmma_wait(0)


def _add_groups(factor: Factor, tiles: Parts, total: Array, multiply: Callable) -> Array:
    """Returns the sums after a step: the sum of each group, scaled, is added."""
    for i, (start, numbers) in enumerate(factor.pieces(tiles)):

        def sums(acc, numbers=numbers, start=start):
            multiply(acc, numbers, start)
            plgpu.wgmma_wait(0)
            return acc[...].astype(jnp.float32)

        part = pl.run_scoped(sums, ACC((TILE, factor.rows), factor.sums_dtype))
        total = total + part * _along_rows(factor.scale(tiles[1][i]), part.shape)
    return total
