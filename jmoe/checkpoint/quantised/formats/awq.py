"""AWQ's "gemm" packing (arXiv 2306.00978; AutoAWQ and AutoRound write it): ``(code - zero) * scale``.

Codes and zeros lie in words of 32 bits along ``out``, eight each, whose columns are interleaved.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
from jmoe_kernels.quantised import Coding, Quantised, Scales

from jmoe.checkpoint.checkpoint import Checkpoint
from jmoe.checkpoint.quantised.formats.format import Format, StoredEntry, check_finite, read_array
from jmoe.checkpoint.quantised.formats.gptq import (
    KEPT,
    check_symmetric,
    check_words,
    coded,
    scales_of,
    unpacked,
)
from jmoe.checkpoint.safetensors_file import TensorInfo

BITS, PER_WORD = 4, 8
# The columns of a word are, from its lowest bits on, 0, 2, 4, 6, 1, 3, 5, 7. These are the places of columns
# 0 to 7.
PLACES = np.array([0, 4, 1, 5, 2, 6, 3, 7])


@dataclass(frozen=True)
class Awq(Format):
    """Tensors ``qweight`` [in, out / 8], ``qzeros`` [groups, out / 8] and ``scales`` [groups, out].

    group: columns that share a scale; None is the whole row.
    is_symmetric: whether every zero is 8.
    scales: dtype of symmetric scales in the file.
    """

    group: int | None
    is_symmetric: bool
    scales: Scales = "float16"
    name: ClassVar[str] = "awq"

    @property
    def coding(self) -> Coding:
        scales: Scales = self.scales if self.is_symmetric else "float32"
        return Coding("int4", self.group, scales, has_lows=not self.is_symmetric)

    def of_tensors(self, name: str, tensors: Mapping[str, TensorInfo]) -> Self:
        return replace(self, scales=scales_of(self.tensor_names(name)[2], tensors))

    def tensor_names(self, name: str) -> tuple[str, ...]:
        stem = name.removesuffix(".weight")
        return f"{stem}.qweight", f"{stem}.qzeros", f"{stem}.scales"

    def entries(self, name: str, shape: tuple[int, ...]) -> tuple[StoredEntry, ...]:
        check_words(name, shape, PER_WORD)
        out, inner = shape
        groups, (codes, zeros, scales) = self.coding.num_groups(inner), self.tensor_names(name)
        return (
            StoredEntry(codes, (inner, out // PER_WORD), ("I32",)),
            StoredEntry(zeros, (groups, out // PER_WORD), ("I32",)),
            StoredEntry(scales, (groups, out), tuple(KEPT)),
        )

    def read(self, checkpoint: Checkpoint, name: str, entry: int | None, shape: tuple[int, ...]) -> Quantised:
        entries = self.entries(name, shape)
        words, zero_words, scales = (read_array(checkpoint, each, entry) for each in entries)
        check_finite(checkpoint, entries[2].name, scales)
        zeros = _columns(zero_words)
        if self.is_symmetric:
            check_symmetric(checkpoint, entries[1].name, zeros, BITS)
        codes = np.ascontiguousarray(_columns(words).T)
        return coded(codes[:, 0::2] | codes[:, 1::2] << 4, zeros.T, scales.T, self.coding)


def _columns(words: np.ndarray) -> np.ndarray:
    """Returns the codes ``[rows, out]`` of words ``[rows, out / 8]``."""
    nibbles = unpacked(words, BITS).reshape(len(words), -1, PER_WORD)
    return nibbles[..., PLACES].reshape(len(words), -1)
