"""MXFP4: the OCP Microscaling format (v1.0) in blocks of 32 E2M1 numbers, two per byte with the first in the
low four bits, and one scale per block, 2^(byte - 127); as gpt-oss is published, and as compressed-tensors
writes it."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jmoe_kernels.quantised import Coding, Quantised

from jmoe.checkpoint.checkpoint import Checkpoint
from jmoe.checkpoint.quantised.formats.format import Format, StoredEntry, read_array
from jmoe.config.units import brief

BLOCK = 32  # numbers that share a scale
NO_NUMBER = 255  # the scale that means NaN
BLOCKS, SCALES = "_blocks", "_scales"  # of gpt-oss
CODES, SCALE = "_packed", "_scale"  # of compressed-tensors


@dataclass(frozen=True)
class Mxfp4Blocks(Format):
    """Blocks ``[..., out, in / 32, 16]`` of bytes, and scales ``[..., out, in / 32]``."""

    name: ClassVar[str] = "mxfp4 in blocks"

    @property
    def coding(self) -> Coding:
        return Coding("e2m1", BLOCK, "uint8")

    def tensor_names(self, name: str) -> tuple[str, ...]:
        return name + BLOCKS, name + SCALES

    def entries(self, name: str, shape: tuple[int, ...]) -> tuple[StoredEntry, ...]:
        per_row = _scale_shape(name, shape)
        return (
            StoredEntry(name + BLOCKS, (*per_row, BLOCK // 2), ("U8",)),
            StoredEntry(name + SCALES, per_row, ("U8",)),
        )

    def read(self, checkpoint: Checkpoint, name: str, entry: int | None, shape: tuple[int, ...]) -> Quantised:
        blocks, scales = (read_array(checkpoint, each, entry) for each in self.entries(name, shape))
        check_exponents(checkpoint, name + SCALES, scales)
        values = blocks.reshape(*shape[:-1], shape[-1] // 2)
        return Quantised(values, scales, None, self.coding, "float32")


@dataclass(frozen=True)
class Mxfp4Rows(Format):
    """Codes ``[..., out, in / 2]`` of bytes, and scales ``[..., out, in / 32]``."""

    name: ClassVar[str] = "mxfp4 in rows"

    @property
    def coding(self) -> Coding:
        return Coding("e2m1", BLOCK, "uint8")

    def tensor_names(self, name: str) -> tuple[str, ...]:
        return name + CODES, name + SCALE

    def entries(self, name: str, shape: tuple[int, ...]) -> tuple[StoredEntry, ...]:
        return (
            StoredEntry(name + CODES, (*shape[:-1], shape[-1] // 2), ("U8",)),
            StoredEntry(name + SCALE, _scale_shape(name, shape), ("U8", "F8_E8M0")),
        )

    def read(self, checkpoint: Checkpoint, name: str, entry: int | None, shape: tuple[int, ...]) -> Quantised:
        values, scales = (read_array(checkpoint, each, entry) for each in self.entries(name, shape))
        check_exponents(checkpoint, name + SCALE, scales)
        return Quantised(values, scales, None, self.coding, "float32")


def _scale_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if shape[-1] % BLOCK:
        raise ValueError(f"tensor {name!r}: rows of {shape[-1]} do not split into blocks of {BLOCK}")
    return (*shape[:-1], shape[-1] // BLOCK)


def check_exponents(checkpoint: Checkpoint, name: str, scales: np.ndarray) -> None:
    """Raises ValueError naming the tensor if a scale is the byte that means NaN."""
    if (scales == NO_NUMBER).any():
        file = checkpoint.tensors[name].file
        raise ValueError(f"{file}: tensor {brief(name)} has the scale {NO_NUMBER}, which is NaN")
