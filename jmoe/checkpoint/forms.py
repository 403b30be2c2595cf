"""The forms of ``jmoe.models.weights`` in numpy: what a slice of a parameter is read from, and its values.

MXFP4 is the OCP Microscaling format (v1.0) as gpt-oss is published: blocks of 32 numbers E2M1, two a byte
with the first in the low four bits, and of each block a scale of 2^(byte - 127).
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from jmoe.checkpoint.safetensors_file import DTYPES
from jmoe.models.weights import Form, Stored

BLOCK = 32  # numbers that share a scale
PAIRS = BLOCK // 2  # bytes of a block
NO_NUMBER = 255  # the scale that is NaN
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)


@dataclass(frozen=True)
class Entry:
    """What is read of one tensor. shape: of one entry of a stacked one. dtypes: the file's names for them."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


def entries(stored: Stored, shape: tuple[int, ...]) -> tuple[Entry, ...]:
    """What a slice of that shape is read from.

    Raises ValueError naming the tensor where its form cannot hold such a slice.
    """
    lies = stored_shape(stored.form, shape)
    if not stored.form.mxfp4:
        return (Entry(stored.name, lies, tuple(DTYPES)),)
    if lies[-1] % BLOCK:
        raise ValueError(f"tensor {stored.name!r}: rows of {lies[-1]} do not split into blocks of {BLOCK}")
    blocks, scales = stored.tensors
    per_row = (*lies[:-1], lies[-1] // BLOCK)
    return Entry(blocks, (*per_row, PAIRS), ("U8",)), Entry(scales, per_row, ("U8",))


def stored_shape(form: Form, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which the values of a slice of ``shape`` are stored, before any quantisation."""
    if form.rows != "plain":
        shape = (shape[0] * shape[1], *shape[2:])
    return (*shape[:-2], shape[-1], shape[-2]) if form.transposed else shape


def in_stored_order(out: np.ndarray, form: Form) -> np.ndarray:
    """A slice seen so that its elements in C order are the values in the order in which they are stored.

    A view, whose axes may be finer than the stored ones: what is assigned to it, part by part along its first
    axis, becomes the slice.
    """
    if form.rows == "alternate":
        out = out.swapaxes(0, 1)
    if not form.transposed:
        return out
    return np.moveaxis(out, -1, 0) if form.rows != "plain" else out.swapaxes(-1, -2)


def dequantised(blocks: np.ndarray, scales: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The numbers of MXFP4 blocks ``[..., 16]`` with scales ``[...]``, flat, in float32 or bfloat16.

    Exact, but for what is beyond the dtype, which becomes Inf. A scale of 255 gives NaN.
    """
    table = _pairs(np.dtype(dtype))
    index = scales.astype(np.intp)[..., None] << 8 | blocks
    return np.take(table, index.reshape(-1)).view(dtype)


@lru_cache(maxsize=2)
def _pairs(dtype: np.dtype) -> np.ndarray:
    """The two numbers that each byte is under each scale, as one unsigned integer; by ``scale * 256 + byte``.

    One look-up gives both in their dtype: bfloat16 products in numpy take ten times as long.
    """
    byte = np.arange(256)
    pair = np.array(E2M1, np.float32)[np.stack([byte & 15, byte >> 4], axis=-1)]
    with np.errstate(over="ignore"):
        values = np.ldexp(pair[None], np.arange(256)[:, None, None] - 127)
        values[NO_NUMBER] = np.nan
        values = np.ascontiguousarray(values.astype(dtype))
    return values.view(np.uint32 if dtype.itemsize == 2 else np.uint64).reshape(-1)
