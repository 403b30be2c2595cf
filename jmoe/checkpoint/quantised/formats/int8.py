"""Eight-bit integers with a scale, and perhaps a zero point, for each group, block, row or tensor:
compressed-tensors' ``int-quantized``."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
from jmoe_kernels.quantised import Coding, Quantised, Scales

from jmoe.checkpoint.checkpoint import Checkpoint
from jmoe.checkpoint.quantised.formats.format import Format, StoredEntry, check_finite, read_array
from jmoe.checkpoint.quantised.formats.grids import FLOAT_SCALES, Block, by_row, check_groups, grid_shape
from jmoe.checkpoint.safetensors_file import TensorInfo

SCALE, ZERO = "_scale", "_zero_point"


@dataclass(frozen=True)
class Int8(Format):
    """Integers ``[..., out, in]``: a number is ``(code - zero point) * scale``.

    block: rows and columns that share a scale.
    has_zeros: whether there are zero points, shaped as the scales.
    scales: dtype of the scales in memory.
    """

    block: Block
    has_zeros: bool = False
    scales: Scales = "float32"
    name: ClassVar[str] = "int8"

    @property
    def coding(self) -> Coding:
        return Coding("int8", self.block[1], self.scales, self.has_zeros)

    def of_tensors(self, name: str, tensors: Mapping[str, TensorInfo]) -> Self:
        return replace(self, scales=scales_in_memory(name + SCALE, tensors, self.has_zeros))

    def tensor_names(self, name: str) -> tuple[str, ...]:
        return (name, name + SCALE, *[name + ZERO] * self.has_zeros)

    def entries(self, name: str, shape: tuple[int, ...]) -> tuple[StoredEntry, ...]:
        check_groups(name, shape, self.block)
        grid = grid_shape(shape, self.block)
        return (
            StoredEntry(name, shape, ("I8",)),
            StoredEntry(name + SCALE, grid, tuple(FLOAT_SCALES)),
            *[StoredEntry(name + ZERO, grid, ("I8",))] * self.has_zeros,
        )

    def read(self, checkpoint: Checkpoint, name: str, entry: int | None, shape: tuple[int, ...]) -> Quantised:
        values, scales, *zeros = (read_array(checkpoint, e, entry) for e in self.entries(name, shape))
        check_finite(checkpoint, name + SCALE, scales)
        lows = -zeros[0].astype(np.float32) * scales.astype(np.float32) if zeros else None
        return Quantised(
            values,
            by_row(scales.astype(self.coding.scales), shape, self.block),
            None if lows is None else by_row(lows, shape, self.block),
            self.coding,
            "float32",
        )


def scales_in_memory(name: str, tensors: Mapping[str, TensorInfo], has_lows: bool) -> Scales:
    """Returns the dtype in which scales are kept: that of the file, or float32 if there are lows, which are
    products and exact only in float32."""
    dtype = tensors[name].dtype if name in tensors else "F32"
    return "float32" if has_lows else FLOAT_SCALES.get(dtype, "float32")
