"""The layouts of quantised weights in memory: one record each, which the loader, meshes and readers use.

A layout says how each device's part of an array of a weight lies in memory: its shape, its dtype, and the
order of its numbers. The leading axes of a weight are the first axes of all its arrays in every layout.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jax.sharding import PartitionSpec

from jmoe_kernels.quantised import interleave, tiles, transpose
from jmoe_kernels.quantised.codes import Code, num_packed, numbers_of, scales_as_float

LayoutName = Literal["rows", "n16", "columns", "tiles"]
Role = Literal["values", "scales", "lows"]  # what an array is to its weight


@dataclass(frozen=True)
class Layout:
    """A layout. The defaults are those of "rows", which is the order of checkpoints.

    fits: function (code, shape) that returns whether a device's part of a weight can lie so.
    kept: function (shape, dtype, role, code) that returns an array's shape and dtype in memory.
    axes: function (axes, role) that returns by which mesh axes an array in memory is split.
    pack: function (array, role, code, is_scratch) that returns a numpy array in this order; it may change
        ``array`` if that is scratch.
    shape: function (shape of the values in memory, code) that returns the weight's shape.
    numbers: function (values, code) that returns the numbers ``[..., out, in]`` before any scale, in float32.
    per_group: function (scales or lows) that returns them as ``[..., out, groups]``, in float32.
    block: number of rows that are permuted among themselves; None if rows are not an axis before the last.
    """

    fits: Callable[[Code, tuple[int, ...]], bool] = lambda code, shape: True
    kept: Callable[[tuple[int, ...], np.dtype, Role, Code], tuple[tuple[int, ...], np.dtype]] = (
        lambda shape, dtype, role, code: (shape, dtype)
    )
    axes: Callable[[PartitionSpec, Role], PartitionSpec] = lambda axes, role: axes
    pack: Callable[[np.ndarray, Role, Code, bool], np.ndarray] = lambda array, role, code, is_scratch: array
    shape: Callable[[tuple[int, ...], Code], tuple[int, ...]] = lambda shape, code: (
        *shape[:-1],
        shape[-1] * num_packed(code),
    )
    numbers: Callable[[Any, Code], Any] = numbers_of
    per_group: Callable[[Any], Any] = scales_as_float
    block: int | None = 1


LAYOUTS: dict[LayoutName, Layout] = {
    "rows": Layout(),
    "n16": Layout(
        fits=interleave.fits,
        pack=interleave.pack,
        numbers=interleave.numbers,
        per_group=interleave.per_group,
        block=interleave.BLOCK,
    ),
    "columns": Layout(
        fits=transpose.fits,
        kept=transpose.kept,
        axes=transpose.axes,
        pack=transpose.pack,
        shape=transpose.shape,
        numbers=transpose.numbers,
        per_group=transpose.per_group,
        block=None,
    ),
    "tiles": Layout(
        fits=tiles.fits,
        kept=tiles.kept,
        pack=tiles.pack,
        shape=tiles.shape,
        numbers=tiles.numbers,
        per_group=tiles.per_group,
        block=tiles.TILE,
    ),
}
