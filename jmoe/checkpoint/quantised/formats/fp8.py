"""Eight-bit floats with a scale for each block, row or tensor.

DeepSeek's form (DeepSeek-V3, arXiv 2412.19437, section 3.3.2) has blocks of 128 x 128, of which the last ones
may be cut. Its scales multiply, although their name ends in "_inv".
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jmoe_kernels.quantised import Coding, Quantised, Scales, exponent_scales

from jmoe.checkpoint.checkpoint import Checkpoint
from jmoe.checkpoint.quantised.formats.format import Format, StoredEntry, check_finite, read_array
from jmoe.checkpoint.quantised.formats.grids import Block, by_row, check_groups, grid_shape
from jmoe.checkpoint.quantised.formats.mxfp4 import check_exponents
from jmoe.config.units import brief

NO_NUMBER = 0x7F  # the bits of NaN, without the sign
SCALES = ("F32", "BF16", "F16")
BYTES = ("F8_E8M0", "U8")  # "ue8m0": 2^(byte - 127)


@dataclass(frozen=True)
class Fp8(Format):
    """E4M3 numbers ``[..., out, in]`` and their scales.

    block: rows and columns that share a scale; a row is ``(1, None)``, the whole tensor ``(None, None)``.
    suffix: what follows the weight's name in the name of its scales.
    keeps_bytes: whether scales that are powers of two stay bytes in memory.
    """

    block: Block
    suffix: str
    keeps_bytes: bool = False
    name: ClassVar[str] = "fp8"

    @property
    def coding(self) -> Coding:
        scales: Scales = "uint8" if self.keeps_bytes else "float32"
        return Coding("e4m3", self.block[1], scales)

    def tensor_names(self, name: str) -> tuple[str, ...]:
        return name, name + self.suffix

    def entries(self, name: str, shape: tuple[int, ...]) -> tuple[StoredEntry, ...]:
        check_groups(name, shape, self.block)
        kinds = BYTES if self.keeps_bytes else SCALES + BYTES
        return (
            StoredEntry(name, shape, ("F8_E4M3",)),
            StoredEntry(name + self.suffix, grid_shape(shape, self.block), kinds),
        )

    def read(self, checkpoint: Checkpoint, name: str, entry: int | None, shape: tuple[int, ...]) -> Quantised:
        values, scales = (read_array(checkpoint, each, entry) for each in self.entries(name, shape))
        if (values.view(np.uint8) & NO_NUMBER == NO_NUMBER).any():
            raise ValueError(f"{checkpoint.tensors[name].file}: tensor {brief(name)} has NaN")
        if scales.itemsize == 1:
            scales = scales.view(np.uint8)
            check_exponents(checkpoint, name + self.suffix, scales)
            scales = scales if self.keeps_bytes else exponent_scales(scales)
        else:
            scales = scales.astype(np.float32)
            check_finite(checkpoint, name + self.suffix, scales)
        return Quantised(values, by_row(scales, shape, self.block), None, self.coding, "float32")
