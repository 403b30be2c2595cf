"""The layout "tiles" of quantised weights: what a tile of 64 rows needs lies together, for the GPU's kernels.

Bytes stay as they are. Nibbles become signed four-bit integers: "int4" its numbers, "e2m1" the place of a
number among those of its sign, from -7 to 7. The numbers of the table "iq4" become int8. The scales of 64
neighbouring rows are ``[groups, 64]``, and lows likewise, so that one transfer takes those of a group; the
arrays keep their shape and dtype.
"""

from typing import Any

import numpy as np

from jmoe_kernels.quantised.codes import TABLES, Code, bytes_as_float, nibbles_of, num_packed, scales_as_float

TILE = 64  # rows
PLACES = np.asarray([n if n < 8 else (8 - n) & 15 for n in range(16)], np.uint8)  # of e2m1, by its codes


def fits(code: Code, shape: tuple[int, ...]) -> bool:
    """Returns whether a weight can lie so: stacks of matrices of whole tiles can."""
    return len(shape) > 2 and shape[-2] % TILE == 0


def kept(shape: tuple[int, ...], dtype: np.dtype, role: str, code: Code) -> tuple[tuple[int, ...], np.dtype]:
    """Returns the shape and the dtype in memory of an array that a checkpoint has as ``shape``."""
    if role == "values" and code == "iq4":
        return (*shape[:-1], 2 * shape[-1]), np.dtype(np.int8)
    return shape, dtype


def pack(array: np.ndarray, role: str, code: Code, is_scratch: bool) -> np.ndarray:
    """Returns an array in this layout."""
    if role != "values":
        tiles = array.reshape(-1, TILE, array.shape[-1])
        return np.ascontiguousarray(tiles.swapaxes(1, 2)).reshape(array.shape)
    if code == "int4":
        return array ^ np.uint8(0x88)
    if code == "e2m1":
        return PLACES[array & 15] | PLACES[array >> 4] << 4
    return np.asarray(TABLES["iq4"], np.int8)[nibbles_of(array)] if code == "iq4" else array


def shape(values: tuple[int, ...], code: Code) -> tuple[int, ...]:
    """Returns the shape ``[..., out, in]`` of the weight."""
    return values if code == "iq4" else (*values[:-1], values[-1] * num_packed(code))


def numbers(values: Any, code: Code) -> Any:
    """Returns the numbers ``[..., out, in]`` in float32, before any scale."""
    if code not in ("int4", "e2m1"):
        return bytes_as_float(values, code)
    places = (nibbles_of(values) ^ 8).astype(np.float32) - np.float32(8)
    if code == "int4":
        return places
    xp = values.__array_namespace__()
    table = xp.asarray(TABLES["e2m1"][:8], dtype=np.float32)
    return xp.sign(places) * xp.take(table, xp.abs(places).astype(np.int32), mode="clip")


def per_group(scales: Any) -> Any:
    """Returns scales or lows as ``[..., out, groups]``, in float32."""
    tiles = scales.reshape(-1, scales.shape[-1], TILE).swapaxes(1, 2)
    return scales_as_float(tiles.reshape(scales.shape))
