"""MXFP4 as gpt-oss is published: the OCP Microscaling format (v1.0) in blocks of 32 E2M1 numbers, two per
byte with the first in the low four bits, and one scale per block, 2^(byte - 127)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jmoe_kernels.quantised import Coding, Quantised

from jmoe.checkpoint.formats.format import Format, StoredEntry, read_array
from jmoe.checkpoint.hf_reader import Checkpoint
from jmoe.config.units import brief

BLOCK = 32  # numbers that share a scale
NO_NUMBER = 255  # the scale that means NaN
BLOCKS, SCALES = "_blocks", "_scales"


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
        if shape[-1] % BLOCK:
            raise ValueError(f"tensor {name!r}: rows of {shape[-1]} do not split into blocks of {BLOCK}")
        per_row = (*shape[:-1], shape[-1] // BLOCK)
        return (
            StoredEntry(name + BLOCKS, (*per_row, BLOCK // 2), ("U8",)),
            StoredEntry(name + SCALES, per_row, ("U8",)),
        )

    def read(self, checkpoint: Checkpoint, name: str, entry: int | None, shape: tuple[int, ...]) -> Quantised:
        blocks, scales = (read_array(checkpoint, each, entry) for each in self.entries(name, shape))
        check_exponents(checkpoint, name + SCALES, scales)
        values = blocks.reshape(*shape[:-1], shape[-1] // 2)
        return Quantised(values, scales, None, self.coding, "float32")


def check_exponents(checkpoint: Checkpoint, name: str, scales: np.ndarray) -> None:
    """Raises ValueError naming the tensor if a scale is the byte that means NaN."""
    if (scales == NO_NUMBER).any():
        file = checkpoint.tensors[name].file
        raise ValueError(f"{file}: tensor {brief(name)} has the scale {NO_NUMBER}, which is NaN")
