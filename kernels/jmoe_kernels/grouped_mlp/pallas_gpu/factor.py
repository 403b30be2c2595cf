"""Weights as the first factor of the decode kernels' products: plain, or decoded in registers.

wgmma takes its first factor from registers too. Codes are converted there, so that device and shared memory
see no other form of them. int8 and int4 become bfloat16 in about two instructions a number; e2m1 comes as
signed numbers, of which a few bfloat16 operations make its values; e4m3 becomes float16 and then float32.

Scales act in one of two places. "Late" ones multiply sums: those of whole rows at the end, those of groups at
the end of each group, which costs registers for one more tile of sums. "Early" scales, and lows, act on the
numbers in float32, which are then rounded to bfloat16; this is what portable XLA computes. Windows of many
rows have no registers for late groups, and lows are always early.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe_kernels.quantised import DTYPES, Coding, Quantised, Weight
from jmoe_kernels.quantised.tiles import TILE
from jmoe_kernels.settings import Activations

LATE_ROWS = 32  # the widest window whose groups are scaled late: wider ones spill
INT8_ROWS = 64  # the widest window of int8 rows whose groups are scaled
LEAST_INT8 = {"int8": 32, "iq4": 32, "int4": 64}  # numbers of a product with int8 rows
Parts = tuple[Any, ...]  # a weight's arrays, or their tiles: values, and perhaps scales and lows


def why_unrounded(coding: Coding) -> str | None:
    """Returns why activations are not rounded to int8 for a weight with this coding, or None if they are in
    windows of few rows."""
    least = LEAST_INT8.get(coding.code)
    if least is None:
        return f"the GPU multiplies {coding.code} as bfloat16"
    if coding.has_lows:
        return "the GPU adds lows to the numbers, which it then multiplies as bfloat16"
    if coding.group is not None and coding.group % least:
        return (
            f"the GPU's int8 products of {coding.code} have {least} numbers, and groups have {coding.group}"
        )
    return None


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
        if self.activations != "int8" or self.coding is None or why_unrounded(self.coding) is not None:
            return False
        return self.group >= self.depth or self.rows <= INT8_ROWS

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
                part = part.astype(jnp.float32) * along_rows(self.scale(scales[0][i]), part.shape)
                if self.coding.has_lows:
                    part = part + along_rows(scales[1][i].astype(jnp.float32), part.shape)
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
            return sums * along_rows(self.scale(scales_s[0]), sums.shape)

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


def along_rows(vector: Array, shape: tuple[int, ...]) -> Array:
    """Returns the vector as an array of that shape whose columns are all equal to it."""
    return lax.broadcast_in_dim(vector, shape, (0,))
