"""Integers of four or eight bits, packed without gaps into words of 32 bits: compressed-tensors'
``pack-quantized``.

The code of number i of a row lies at bit ``i * bits``, the lowest bits first; it is the number plus half of
the codes. So the bytes of the words are the nibbles of "int4", and those of "int8" with the sign turned.
"""

import sys
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from jmoe_kernels.quantised import Code, Quantised

from jmoe.checkpoint.checkpoint import Checkpoint
from jmoe.checkpoint.quantised.formats.format import StoredEntry, check_finite, read_array
from jmoe.checkpoint.quantised.formats.grids import FLOAT_SCALES, check_groups, grid_shape
from jmoe.checkpoint.quantised.formats.int8 import SCALE, ZERO, ScaledInts
from jmoe.config.units import brief

CODES, SHAPE = "_packed", "_shape"
WORD = 32  # bits
SIGN = np.uint8(0x80)


@dataclass(frozen=True)
class PackedInts(ScaledInts):
    """Words ``[..., out, in * bits / 32]``. Zero points are packed along ``out``; without them the zero point
    is the middle code.

    bits: bits of a code.
    """

    bits: Literal[4, 8] = 8
    name: ClassVar[str] = "packed integers"

    @property
    def code(self) -> Code:
        return "int4" if self.bits == 4 else "int8"

    def tensor_names(self, name: str) -> tuple[str, ...]:
        return (name + CODES, name + SCALE, name + SHAPE, *[name + ZERO] * self.has_zeros)

    def entries(self, name: str, shape: tuple[int, ...]) -> tuple[StoredEntry, ...]:
        check_groups(name, shape, self.block)
        *front, out, inner = shape
        if inner * self.bits % 8:
            raise ValueError(f"tensor {name!r}: rows of {inner} numbers do not pack into whole bytes")
        grid = grid_shape(shape, self.block)
        zeros = (*front, self._words(out), grid[-1])
        return (
            StoredEntry(name + CODES, (*front, out, self._words(inner)), ("I32",)),
            StoredEntry(name + SCALE, grid, tuple(FLOAT_SCALES)),
            StoredEntry(name + SHAPE, (len(shape),), ("I64", "I32")),
            *[StoredEntry(name + ZERO, zeros, ("I32",))] * self.has_zeros,
        )

    def read(self, checkpoint: Checkpoint, name: str, entry: int | None, shape: tuple[int, ...]) -> Quantised:
        words, scales, stated, *zeros = (read_array(checkpoint, e, entry) for e in self.entries(name, shape))
        if tuple(stated.tolist()) != shape:
            raise ValueError(
                f"{checkpoint.tensors[name + SHAPE].file}: tensor {brief(name + SHAPE)} says "
                f"{stated.tolist()}, {checkpoint.sizes_source} says {list(shape)}"
            )
        check_finite(checkpoint, name + SCALE, scales)
        codes = _bytes(words)[..., : shape[-1] * self.bits // 8]
        values = codes if self.bits == 4 else (codes ^ SIGN).view(np.int8)
        lows = self._lows(zeros[0], scales, shape) if zeros else None
        return self.weight(np.ascontiguousarray(values), scales, lows, shape)

    def _lows(self, words: np.ndarray, scales: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Returns the lows ``[..., out, groups]`` that zero points make."""
        codes = _bytes(words.swapaxes(-1, -2))
        if self.bits == 4:
            codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
        zeros = codes[..., : shape[-2]].swapaxes(-1, -2).astype(np.float32)
        middle = np.float32(1 << (self.bits - 1))
        return (middle - zeros) * scales.astype(np.float32)

    def _words(self, count: int) -> int:
        return -(-count * self.bits // WORD)


def _bytes(words: np.ndarray) -> np.ndarray:
    """Returns the bytes of words, those of the last axis in the order of their bits."""
    words = np.ascontiguousarray(words)
    return (words if sys.byteorder == "little" else words.byteswap()).view(np.uint8)
