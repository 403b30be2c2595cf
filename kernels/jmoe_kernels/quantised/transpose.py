"""The layout "columns" of quantised weights: numbers ``[..., in, out]``, for the matrix units of TPUs.

A matrix unit loads ``[in, out]`` as it lies, and turns ``[out, in]`` while it loads it, which costs more
cycles than the transfer of so few bytes. Codes are what the unit multiplies: bytes as they are, "int4" as
signed four-bit integers, and numbers of the other tables as int8 (twice an E2M1 is a whole number, so its
scales are halved, which is exact). Scales and lows are float32 ``[..., groups, 1, out]``: the axis of one
makes a tile of a row, so that a transfer may take any of the groups.
"""

from typing import Any

import numpy as np
from jax.sharding import PartitionSpec

from jmoe_kernels.quantised.codes import INT4, TABLES, Code, bytes_as_float, nibbles_of, scales_as_float

FACTORS: dict[Code, int] = {"e2m1": 2, "iq4": 1}  # what makes a table's numbers whole


def fits(code: Code, shape: tuple[int, ...]) -> bool:
    """Returns whether a weight can lie so: whole stacks of matrices can."""
    return len(shape) > 2


def kept(shape: tuple[int, ...], dtype: np.dtype, role: str, code: Code) -> tuple[tuple[int, ...], np.dtype]:
    """Returns the shape and the dtype in memory of an array that a checkpoint has as ``shape``."""
    *front, out, inner = shape
    if role != "values":
        return (*front, inner, 1, out), np.dtype(np.float32)
    if code not in TABLES:
        return (*front, inner, out), dtype
    return (*front, 2 * inner, out), INT4 if code == "int4" else np.dtype(np.int8)


def axes(spec: PartitionSpec, role: str) -> PartitionSpec:
    """Returns how an array is split that a checkpoint's order would split by ``spec``, which names all
    axes."""
    *front, out, inner = spec
    return PartitionSpec(*front, inner, out) if role == "values" else PartitionSpec(*front, inner, None, out)


def pack(array: np.ndarray, role: str, code: Code, is_scratch: bool) -> np.ndarray:
    """Returns an array in this layout."""
    if role != "values":
        scales = scales_as_float(array)
        if role == "scales" and code in FACTORS:
            scales = scales / np.float32(FACTORS[code])
        return np.ascontiguousarray(scales.swapaxes(-1, -2))[..., None, :]
    if code not in TABLES:
        return np.ascontiguousarray(array.swapaxes(-1, -2))
    nibbles = np.ascontiguousarray(nibbles_of(array).swapaxes(-1, -2))
    if code == "int4":
        return (nibbles.view(np.int8) - np.int8(8)).astype(INT4)
    return (np.asarray(TABLES[code]) * FACTORS[code]).astype(np.int8)[nibbles]


def shape(values: tuple[int, ...], code: Code) -> tuple[int, ...]:
    """Returns the shape ``[..., out, in]`` of the weight."""
    *front, inner, out = values
    return (*front, out, inner)


def numbers(values: Any, code: Code) -> Any:
    """Returns the numbers ``[..., out, in]`` in float32, before any scale."""
    return bytes_as_float(values, code).swapaxes(-1, -2)


def per_group(scales: Any) -> Any:
    """Returns scales or lows as ``[..., out, groups]``."""
    return scales[..., 0, :].swapaxes(-1, -2)
