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


@dataclass(frozen=True)
class Mxfp4(Format):
    """Codes of bytes, and scales ``[..., out, in / 32]``.

    codes, scale: what follows the weight's name in the names of its tensors.
    in_blocks: whether codes are ``[..., out, in / 32, 16]``; otherwise ``[..., out, in / 2]``.
    """

    codes: str
    scale: str
    in_blocks: bool
    name: ClassVar[str] = "mxfp4"

    @property
    def coding(self) -> Coding:
        return Coding("e2m1", BLOCK, "uint8")

    def tensor_names(self, name: str) -> tuple[str, ...]:
        return name + self.codes, name + self.scale

    def entries(self, name: str, shape: tuple[int, ...]) -> tuple[StoredEntry, ...]:
        *front, inner = shape
        if inner % BLOCK:
            raise ValueError(f"tensor {name!r}: rows of {inner} do not split into blocks of {BLOCK}")
        per_row = (*front, inner // BLOCK)
        codes = (*per_row, BLOCK // 2) if self.in_blocks else (*front, inner // 2)
        return (
            StoredEntry(name + self.codes, codes, ("U8",)),
            StoredEntry(name + self.scale, per_row, ("U8", "F8_E8M0")),
        )

    def read(self, checkpoint: Checkpoint, name: str, entry: int | None, shape: tuple[int, ...]) -> Quantised:
        codes, scales = (read_array(checkpoint, each, entry) for each in self.entries(name, shape))
        check_exponents(checkpoint, name + self.scale, scales)
        values = codes.reshape(*shape[:-1], shape[-1] // 2)
        return Quantised(values, scales, None, self.coding, "float32")


IN_BLOCKS = Mxfp4("_blocks", "_scales", in_blocks=True)  # of gpt-oss
IN_ROWS = Mxfp4("_packed", "_scale", in_blocks=False)  # of compressed-tensors


def check_exponents(checkpoint: Checkpoint, name: str, scales: np.ndarray) -> None:
    """Raises ValueError naming the tensor if a scale is the byte that means NaN."""
    if (scales == NO_NUMBER).any():
        file = checkpoint.tensors[name].file
        raise ValueError(f"{file}: tensor {brief(name)} has the scale {NO_NUMBER}, which is NaN")
