"""MXFP4, the OCP Microscaling format (v1.0) in which gpt-oss is published: blocks of 32 E2M1 numbers, two per
byte with the first in the low four bits, and one scale per block, 2^(byte - 127)."""

from functools import lru_cache

import numpy as np

from jmoe.checkpoint.formats.format import Format, StoredEntry
from jmoe.checkpoint.hf_reader import HFCheckpoint, all_finite
from jmoe.config.units import brief

BLOCK = 32  # numbers that share a scale
PAIRS = BLOCK // 2  # bytes of a block
NO_NUMBER = 255  # the scale that means NaN
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)
BLOCKS, SCALES = "_blocks", "_scales"
DTYPE = "U8"  # of both tensors


def entries(name: str, shape: tuple[int, ...]) -> tuple[StoredEntry, ...]:
    if shape[-1] % BLOCK:
        raise ValueError(f"tensor {name!r}: rows of {shape[-1]} do not split into blocks of {BLOCK}")
    per_row = (*shape[:-1], shape[-1] // BLOCK)
    return StoredEntry(name + BLOCKS, (*per_row, PAIRS), (DTYPE,)), StoredEntry(
        name + SCALES, per_row, (DTYPE,)
    )


def read(checkpoint: HFCheckpoint, name: str, start: int, out: np.ndarray) -> None:
    blocks, scales, at, count = name + BLOCKS, name + SCALES, start // BLOCK, out.size // BLOCK
    exponents = checkpoint.read_bytes(scales, DTYPE, at, count)
    if (exponents == NO_NUMBER).any():
        file = checkpoint.tensors[scales].file
        raise ValueError(f"{file}: tensor {brief(scales)} has the scale {NO_NUMBER}, which is NaN")
    pairs = checkpoint.read_bytes(blocks, DTYPE, at * PAIRS, count * PAIRS)
    dequantise(pairs.reshape(-1, PAIRS), exponents, out)
    if not all_finite(out):
        file = checkpoint.tensors[blocks].file
        raise ValueError(f"{file}: tensor {brief(blocks)} has NaN or Inf (as {out.dtype})")


def dequantise(blocks: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
    """Fills ``out``, flat in float32 or bfloat16, with the numbers of blocks ``[..., 16]``, scales ``[...]``.

    The result is exact, except that numbers beyond the dtype's range become Inf. A scale of 255 gives NaN.
    """
    table = _pairs(out.dtype)
    index = scales.astype(np.intp)[..., None] << 8 | blocks
    np.take(table, index.reshape(-1), out=out.view(table.dtype), mode="clip")  # "raise" would copy out


@lru_cache(maxsize=2)
def _pairs(dtype: np.dtype) -> np.ndarray:
    """Returns the two numbers of each byte at each scale, as one unsigned integer.

    The index is ``scale * 256 + byte``. One look-up gives both numbers in their dtype: bfloat16 products in
    numpy take ten times as long.
    """
    byte = np.arange(256)
    pair = np.array(E2M1, np.float32)[np.stack([byte & 15, byte >> 4], axis=-1)]
    with np.errstate(over="ignore"):
        values = np.ldexp(pair[None], np.arange(256)[:, None, None] - 127)
        values[NO_NUMBER] = np.nan
        values = np.ascontiguousarray(values.astype(dtype))
    return values.view(np.uint32 if dtype.itemsize == 2 else np.uint64).reshape(-1)


FORMAT = Format("mxfp4", (BLOCKS, SCALES), entries, read)
