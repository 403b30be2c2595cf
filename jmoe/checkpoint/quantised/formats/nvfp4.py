"""NVFP4: blocks of 16 E2M1 numbers, two per byte with the first in the low four bits, one E4M3 scale per
block, and one float32 scale for the whole weight, which multiplies (modelopt) or divides
(compressed-tensors)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jmoe_kernels.quantised import Coding, Quantised

from jmoe.checkpoint.checkpoint import Checkpoint
from jmoe.checkpoint.quantised.formats.format import Format, StoredEntry, check_finite, read_array
from jmoe.config.units import brief

BLOCK = 16  # numbers that share a scale


@dataclass(frozen=True)
class Nvfp4(Format):
    """Codes ``[..., out, in / 2]`` and scales ``[..., out, in / 16]``. In memory the two scales are one.

    scale, global_scale: what follows the weight's name in the names of its scales.
    multiplies: whether the global scale multiplies; otherwise it divides.
    codes: what follows the weight's name in the name of its codes.
    """

    scale: str
    global_scale: str
    multiplies: bool
    codes: str = ""
    name: ClassVar[str] = "nvfp4"

    @property
    def coding(self) -> Coding:
        return Coding("e2m1", BLOCK)

    def tensor_names(self, name: str) -> tuple[str, ...]:
        return name + self.codes, name + self.scale, name + self.global_scale

    def entries(self, name: str, shape: tuple[int, ...]) -> tuple[StoredEntry, ...]:
        *front, inner = shape
        if inner % BLOCK:
            raise ValueError(f"tensor {name!r}: rows of {inner} do not split into blocks of {BLOCK}")
        return (
            StoredEntry(name + self.codes, (*front, inner // 2), ("U8",)),
            StoredEntry(name + self.scale, (*front, inner // BLOCK), ("F8_E4M3",)),
            StoredEntry(name + self.global_scale, (1,), ("F32",)),
        )

    def read(self, checkpoint: Checkpoint, name: str, entry: int | None, shape: tuple[int, ...]) -> Quantised:
        values, scales, whole = (read_array(checkpoint, e, entry) for e in self.entries(name, shape))
        check_finite(checkpoint, name + self.scale, scales)
        check_finite(checkpoint, name + self.global_scale, whole)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            both = scales.astype(np.float32) * whole if self.multiplies else scales.astype(np.float32) / whole
        if not np.isfinite(both).all():
            tensor = name + self.global_scale
            raise ValueError(
                f"{checkpoint.tensors[tensor].file}: tensor {brief(tensor)} has the scale {whole[0]}, with "
                "which a number is NaN or Inf"
            )
        return Quantised(values, both, None, self.coding, "float32")
