"""The types of ggml whose numbers are in blocks, unpacked into canonical codes.

Each function takes blocks ``[n, bytes]`` and returns codes, scales and lows of the same numbers. They are
equal to ggml's own numbers in float32, with one exception: for Q4_K and Q4_1 the low of the canonical codes
is a sum, which rounds in its last bit if the block's scale is more than some ten times its minimum.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from jmoe_kernels.quantised import Coding, Quantised

from jmoe.checkpoint.checkpoint import Checkpoint
from jmoe.checkpoint.gguf.file import TYPES
from jmoe.checkpoint.quantised.formats.format import Format, StoredEntry, check_finite
from jmoe.checkpoint.quantised.formats.mxfp4 import check_exponents

Unpacked = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # codes (nibbles packed), scales, lows
CHUNK = 1 << 12  # blocks that are unpacked at a time, so that they stay in the cache
F32 = np.float32


def _halves(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw).view(np.float16)


def _nibbles(raw: np.ndarray, half: int) -> np.ndarray:
    """Returns the nibbles of bytes ``[n, count]``: of every ``half`` bytes first all low ones, then all high
    ones."""
    each = raw.reshape(len(raw), -1, half)
    return np.concatenate([each & 15, each >> 4], axis=-1).reshape(len(raw), -1)


def _packed(codes: np.ndarray) -> np.ndarray:
    return codes[:, 0::2] | codes[:, 1::2] << 4


def _bits(raw: np.ndarray) -> np.ndarray:
    return np.unpackbits(raw, axis=-1, bitorder="little")


def q8_0(raw: np.ndarray) -> Unpacked:
    return raw[:, 2:].view(np.int8), _halves(raw[:, :2]), None


def q4_0(raw: np.ndarray) -> Unpacked:
    return _packed(_nibbles(raw[:, 2:], 16)), _halves(raw[:, :2]), None


def q4_1(raw: np.ndarray) -> Unpacked:
    scales, least = (_halves(raw[:, at : at + 2]).astype(F32) for at in (0, 2))
    return _packed(_nibbles(raw[:, 4:], 16)), scales, 8 * scales + least


def q5_0(raw: np.ndarray) -> Unpacked:
    codes = _nibbles(raw[:, 6:], 16) | _bits(raw[:, 2:6]) << 4
    return codes.view(np.int8) - np.int8(16), _halves(raw[:, :2]), None


def q5_1(raw: np.ndarray) -> Unpacked:
    codes = _nibbles(raw[:, 8:], 16) | _bits(raw[:, 4:8]) << 4
    return codes.view(np.int8), _halves(raw[:, :2]), _halves(raw[:, 2:4])


def _k_scales(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the eight scales and minimums of a block of Q4_K or Q5_K."""
    d, least, packed = _halves(raw[:, 0:2]).astype(F32), _halves(raw[:, 2:4]).astype(F32), raw[:, 4:16]
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=-1)
    lows = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=-1)
    return d * scales.astype(F32), least * lows.astype(F32)


def q4_k(raw: np.ndarray) -> Unpacked:
    scales, least = _k_scales(raw)
    return _packed(_nibbles(raw[:, 16:], 32)), scales, 8 * scales - least


def q5_k(raw: np.ndarray) -> Unpacked:
    scales, least = _k_scales(raw)
    high = raw[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    codes = _nibbles(raw[:, 48:], 32) | high.reshape(len(raw), -1) << 4
    return codes.view(np.int8), scales, -least


def q6_k(raw: np.ndarray) -> Unpacked:
    scales = _halves(raw[:, 208:]).astype(F32) * raw[:, 192:208].view(np.int8).astype(F32)
    pairs = raw[:, 128:192].reshape(len(raw), 2, 1, 32)
    high = pairs >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    codes = _nibbles(raw[:, :128], 64) | high.reshape(len(raw), -1) << 4
    return codes.view(np.int8) - np.int8(32), scales, None


def iq4_xs(raw: np.ndarray) -> Unpacked:
    high = np.ascontiguousarray(raw[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = np.stack([raw[:, 4:8] & 15, raw[:, 4:8] >> 4], axis=-1).reshape(len(raw), -1)
    steps = (low | high.astype(np.uint8) << 4).astype(F32) - 32
    return _packed(_nibbles(raw[:, 8:], 16)), _halves(raw[:, :2]).astype(F32) * steps, None


def mxfp4(raw: np.ndarray) -> Unpacked:
    """ggml's table has twice the numbers of E2M1 and its scale is half of 2^(byte - 127)."""
    return _packed(_nibbles(raw[:, 1:], 16)), raw[:, :1], None


@dataclass(frozen=True)
class Blocks(Format):
    """One type of ggml.

    kind: its name.
    kept_as: coding of the numbers in memory.
    unpack: function that unpacks blocks.
    """

    kind: str
    kept_as: Coding
    unpack: Callable[[np.ndarray], Unpacked] = field(repr=False)
    name: ClassVar[str] = "a GGUF type"

    @property
    def coding(self) -> Coding:
        return self.kept_as

    def tensor_names(self, name: str) -> tuple[str, ...]:
        return (name,)

    def entries(self, name: str, shape: tuple[int, ...]) -> tuple[StoredEntry, ...]:
        size, _ = BLOCKS[self.kind]
        if shape[-1] % size:
            raise ValueError(f"tensor {name!r}: rows of {shape[-1]} do not split into blocks of {size}")
        return (StoredEntry(name, shape, (self.kind,)),)

    def read(self, checkpoint: Checkpoint, name: str, entry: int | None, shape: tuple[int, ...]) -> Quantised:
        size, nbytes = BLOCKS[self.kind]
        count = math.prod(shape) // size
        raw = checkpoint.read_bytes(name, self.kind, (entry or 0) * count, count).reshape(count, nbytes)
        spec = self.coding.shapes((count, size))
        values, scales = (np.empty(each.shape, each.dtype) for each in (spec.values, spec.scales))
        lows = np.empty_like(scales) if self.coding.has_lows else None
        for at in range(0, count, CHUNK):
            part = slice(at, at + CHUNK)
            values[part], scales[part], low = self.unpack(raw[part])
            if lows is not None and low is not None:
                lows[part] = low
        if scales.dtype == np.uint8:
            check_exponents(checkpoint, name, scales)
        else:
            check_finite(checkpoint, name, scales)
        if lows is not None:
            check_finite(checkpoint, name, lows, "minimum")
        rows = shape[:-1]
        lows = None if lows is None else lows.reshape(*rows, -1)
        return Quantised(values.reshape(*rows, -1), scales.reshape(*rows, -1), lows, self.coding, "float32")


BLOCKS = {kind: (size, nbytes) for kind, size, nbytes in TYPES.values()}  # numbers and bytes of a block
FORMATS = {
    each.kind: each
    for each in (
        Blocks("Q8_0", Coding("int8", 32, "float16"), q8_0),
        Blocks("Q4_0", Coding("int4", 32, "float16"), q4_0),
        Blocks("Q4_1", Coding("int4", 32, has_lows=True), q4_1),
        Blocks("Q5_0", Coding("int8", 32, "float16"), q5_0),
        Blocks("Q5_1", Coding("int8", 32, "float16", has_lows=True), q5_1),
        Blocks("Q4_K", Coding("int4", 32, has_lows=True), q4_k),
        Blocks("Q5_K", Coding("int8", 32, has_lows=True), q5_k),
        Blocks("Q6_K", Coding("int8", 16), q6_k),
        Blocks("IQ4_NL", Coding("iq4", 32, "float16"), q4_0),
        Blocks("IQ4_XS", Coding("iq4", 32), iq4_xs),
        Blocks("MXFP4", Coding("e2m1", 32, "uint8"), mxfp4),
    )
}
READ = ("F32", "F16", "BF16", *FORMATS)
