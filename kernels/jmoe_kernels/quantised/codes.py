"""The kinds of codes, and the numbers that codes and scales stand for."""

import math
from typing import Any, Literal

import ml_dtypes
import numpy as np
from jax import lax

Code = Literal["int8", "e4m3", "int4", "e2m1", "iq4"]
INT4 = np.dtype(ml_dtypes.int4)
Scales = Literal["float32", "bfloat16", "float16", "uint8"]

# the numbers of a nibble: of OCP's E2M1 (Microscaling formats v1.0), and of ggml's IQ4_NL and IQ4_XS
TABLES: dict[Code, tuple[float, ...]] = {
    "int4": tuple(float(n - 8) for n in range(16)),
    "e2m1": (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0),
    "iq4": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
}
DTYPES: dict[Code, np.dtype] = {
    "int8": np.dtype(np.int8),
    "e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    **dict.fromkeys(TABLES, np.dtype(np.uint8)),
}


def num_packed(code: Code) -> int:
    """Returns the number of codes in one byte."""
    return 2 if code in TABLES else 1


def nbytes_of(shape: tuple[int, ...], dtype: Any) -> int:
    """Returns the bytes of an array on a device, where two four-bit integers share a byte."""
    bits = 4 if np.dtype(dtype) == INT4 else 8 * np.dtype(dtype).itemsize
    return math.prod(shape) * bits // 8


def code_storage(code: Code, platform: str) -> np.dtype:
    """Returns the dtype that stores codes on a platform: a CPU keeps "e4m3" as bytes, because XLA:CPU
    converts a whole stack to read one expert of it."""
    return np.dtype(np.uint8) if code == "e4m3" and platform == "cpu" else DTYPES[code]


def numbers_of(values: Any, code: Code) -> Any:
    """Returns the numbers ``[..., out, in]`` of codes in a checkpoint's order, before any scale, in
    float32."""
    if code in TABLES:
        nibbles = nibbles_of(values)
        if code == "int4":
            return nibbles.astype(np.float32) - np.float32(8)
        xp = values.__array_namespace__()
        table = xp.asarray(TABLES[code], dtype=np.float32)
        return xp.take(table, nibbles.astype(np.int32), mode="clip")
    return bytes_as_float(values, code)


def nibbles_of(values: Any) -> Any:
    """Returns the nibbles ``[..., 2 * n]`` of bytes ``[..., n]``, that of the low bits first, as uint8."""
    xp = values.__array_namespace__()
    return xp.stack([values & 15, values >> 4], axis=-1).reshape(*values.shape[:-1], -1)


def bytes_as_float(values: Any, code: Code) -> Any:
    """Returns codes of a byte as float32."""
    return (bitcast(values, DTYPES["e4m3"]) if code == "e4m3" else values).astype(np.float32)


def scales_as_float(scales: Any) -> Any:
    """Returns scales in float32."""
    return exponent_scales(scales) if scales.dtype == np.uint8 else scales.astype(np.float32)


def exponent_scales(scales: Any) -> Any:
    """Returns E8M0 scales in float32: a byte b is 2^(b - 127)."""
    xp = scales.__array_namespace__()
    bits = xp.where(scales == 0, xp.asarray(1 << 22, dtype=np.int32), scales.astype(np.int32) << 23)
    return bitcast(bits, np.dtype(np.float32))


def bitcast(array: Any, dtype: np.dtype) -> Any:
    """Returns an array's bytes as another dtype of the same width."""
    return array.view(dtype) if isinstance(array, np.ndarray) else lax.bitcast_convert_type(array, dtype)
