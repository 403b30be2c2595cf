"""GPTQ's packing (arXiv 2210.17323; AutoGPTQ, GPTQModel and AutoRound write it): ``(code - zero) * scale``.

Codes lie in words of 32 bits along ``in``, zeros along ``out``, the first in the lowest bits. The first
version of the format stores each zero minus one, modulo the number of codes. ``g_idx`` has the group of every
column.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import numpy as np
from jmoe_kernels.quantised import Code, Coding, Quantised, Scales

from jmoe.checkpoint.checkpoint import Checkpoint
from jmoe.checkpoint.quantised.formats.format import Format, StoredEntry, check_finite, read_array
from jmoe.checkpoint.safetensors_file import TensorInfo
from jmoe.config.units import brief

CODES: dict[int, Code] = {4: "int4", 8: "int8"}
KEPT: dict[str, Scales] = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


@dataclass(frozen=True)
class Gptq(Format):
    """Tensors ``qweight`` [in * bits / 32, out], ``qzeros`` [groups, out * bits / 32], ``scales``
    [groups, out] and perhaps ``g_idx`` [in].

    bits: bits of a code, 4 or 8.
    group: columns that share a scale; None is the whole row.
    is_symmetric: whether every zero is the middle code.
    stores_less_one: whether zeros are stored minus one.
    has_any_order: whether the columns of a group may lie anywhere ("desc_act").
    order: what the tensors say: no ``g_idx``, the ordinary one, or another.
    scales: dtype of symmetric scales in the file.
    """

    bits: int
    group: int | None
    is_symmetric: bool
    stores_less_one: bool = True
    has_any_order: bool = False
    order: Literal["none", "ordinary", "other"] = "none"
    scales: Scales = "float16"
    name: ClassVar[str] = "gptq"

    @property
    def coding(self) -> Coding | None:
        return None if self.order == "other" else self._coding(self.group)

    @property
    def why_dequantised(self) -> str:
        return "desc_act: g_idx puts neighbouring columns into different groups"

    def _coding(self, group: int | None) -> Coding:
        scales: Scales = self.scales if self.is_symmetric else "float32"
        return Coding(CODES[self.bits], group, scales, has_lows=not self.is_symmetric)

    def of_tensors(self, name: str, tensors: Mapping[str, TensorInfo]) -> Self:
        order = "ordinary" if f"{_stem(name)}.g_idx" in tensors else "none"
        return replace(self, order=order, scales=scales_of(f"{_stem(name)}.scales", tensors))

    def of_contents(self, checkpoint: Checkpoint, name: str) -> Self:
        info = checkpoint.tensors.get(f"{_stem(name)}.g_idx")
        if not self.has_any_order or info is None or info.dtype != "I32" or len(info.shape) != 1:
            return self
        g_idx = read_array(checkpoint, StoredEntry(f"{_stem(name)}.g_idx", info.shape, ("I32",)), None)
        return self if self._is_ordinary(g_idx) else replace(self, order="other")

    def _is_ordinary(self, g_idx: np.ndarray) -> bool:
        return bool((g_idx == np.arange(len(g_idx)) // (self.group or len(g_idx))).all())

    def tensor_names(self, name: str) -> tuple[str, ...]:
        parts = ("qweight", "qzeros", "scales") + (() if self.order == "none" else ("g_idx",))
        return tuple(f"{_stem(name)}.{part}" for part in parts)

    def zero_biases(self, name: str) -> tuple[str, ...]:
        """Returns the bias of a layer: old releases of AutoGPTQ write one for every layer."""
        return (f"{_stem(name)}.bias",)

    def entries(self, name: str, shape: tuple[int, ...]) -> tuple[StoredEntry, ...]:
        check_words(name, shape, 32 // self.bits)
        out, inner = shape
        groups = self._coding(self.group).num_groups(inner)
        shapes = ((inner * self.bits // 32, out), (groups, out * self.bits // 32), (groups, out), (inner,))
        kinds = (("I32",), ("I32",), tuple(KEPT), ("I32",))
        return tuple(
            StoredEntry(each, its_shape, dtypes)
            for each, its_shape, dtypes in zip(self.tensor_names(name), shapes, kinds, strict=False)
        )

    def read(self, checkpoint: Checkpoint, name: str, entry: int | None, shape: tuple[int, ...]) -> Quantised:
        entries = self.entries(name, shape)
        words, zeros, scales, *order = (read_array(checkpoint, each, entry) for each in entries)
        check_finite(checkpoint, entries[2].name, scales)
        zeros = unpacked(zeros, self.bits) + np.uint8(self.stores_less_one) & np.uint8(2**self.bits - 1)
        if self.is_symmetric:
            check_symmetric(checkpoint, entries[1].name, zeros, self.bits)
        group = self.group
        if order:
            self._check_order(checkpoint, entries[3].name, order[0], len(scales))
        if self.order == "other":
            zeros, scales, group = zeros[order[0]], scales[order[0]], 1
        values = np.ascontiguousarray(words.T).view(np.uint8)
        if self.bits == 8:
            values = (values ^ np.uint8(128)).view(np.int8)
        return coded(values, zeros.T, scales.T, self._coding(group))

    def _check_order(self, checkpoint: Checkpoint, name: str, g_idx: np.ndarray, groups: int) -> None:
        file = checkpoint.tensors[name].file
        if g_idx.min() < 0 or g_idx.max() >= groups:
            wrong = g_idx[(g_idx < 0) | (g_idx >= groups)][0]
            raise ValueError(f"{file}: tensor {brief(name)} has the group {wrong}, there are {groups}")
        if self.order == "ordinary" and not self._is_ordinary(g_idx):
            raise ValueError(
                f"{file}: tensor {brief(name)} puts neighbouring columns into different groups, but desc_act "
                "is false"
            )


def _stem(name: str) -> str:
    return name.removesuffix(".weight")


def scales_of(name: str, tensors: Mapping[str, TensorInfo]) -> Scales:
    """Returns the dtype of a tensor of scales in memory."""
    return KEPT.get(tensors[name].dtype, "float16") if name in tensors else "float16"


def check_words(name: str, shape: tuple[int, ...], per_word: int) -> None:
    """Raises ValueError naming the tensor if rows or columns do not fill words of 32 bits, or if the weight
    is no matrix."""
    if len(shape) != 2:
        raise ValueError(f"tensor {name!r}: {list(shape)} is no matrix")
    for size in shape:
        if size % per_word:
            raise ValueError(f"tensor {name!r}: {size} numbers do not fill words of {per_word}")


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """Returns the codes of words of 32 bits ``[..., n]`` along the last axis, lowest bits first, a byte
    each."""
    raw = np.ascontiguousarray(words).view(np.uint8)
    return raw if bits == 8 else np.stack([raw & 15, raw >> 4], axis=-1).reshape(*raw.shape[:-1], -1)


def check_symmetric(checkpoint: Checkpoint, name: str, zeros: np.ndarray, bits: int) -> None:
    """Raises ValueError naming the tensor if a zero is not the middle code."""
    middle = 2 ** (bits - 1)
    if (zeros != middle).any():
        file, other = checkpoint.tensors[name].file, zeros[zeros != middle][0]
        raise ValueError(
            f"{file}: tensor {brief(name)} has the zero {other}; by its configuration the codes are "
            f"symmetric, so that every zero is {middle}"
        )


def coded(values: np.ndarray, zeros: np.ndarray, scales: np.ndarray, coding: Coding) -> Quantised:
    """Returns codes as a weight; zeros and scales are ``[out, groups]``.

    ``(code - zero) * scale`` becomes ``(code - middle) * scale + (middle - zero) * scale``. Each product and
    the sum are exact in float32 if the scales are float16 or bfloat16.
    """
    middle = 8 if coding.code == "int4" else 128
    kept = np.ascontiguousarray(scales).astype(coding.scales)
    lows = (np.float32(middle) - zeros.astype(np.float32)) * kept if coding.has_lows else None
    return Quantised(values, kept, lows, coding, "float32")
