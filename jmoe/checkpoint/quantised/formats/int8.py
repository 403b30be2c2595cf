"""Eight-bit integers with a scale, and perhaps a zero point, for each group, block, row or tensor:
compressed-tensors' ``int-quantized``."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
from jmoe_kernels.quantised import Code, Coding, Quantised, Scales

from jmoe.checkpoint.checkpoint import Checkpoint
from jmoe.checkpoint.quantised.formats.format import Format, StoredEntry, check_finite, read_array
from jmoe.checkpoint.quantised.formats.grids import FLOAT_SCALES, Block, by_row, check_groups, grid_shape
from jmoe.checkpoint.safetensors_file import TensorInfo

SCALE, ZERO = "_scale", "_zero_point"


@dataclass(frozen=True)
class ScaledInts(Format):
    """Integers with scales: a number is ``(code - zero point) * scale``.

    block: rows and columns that share a scale.
    has_zeros: whether there are zero points.
    scales: dtype of the scales in memory: that of the file, or float32 if there are zero points, whose lows
        are products and exact only in float32.
    """

    block: Block
    has_zeros: bool = False
    scales: Scales = "float32"

    @property
    @abstractmethod
    def code(self) -> Code:
        """The kind of the codes in memory."""

    @property
    def coding(self) -> Coding:
        return Coding(self.code, self.block[1], self.scales, self.has_zeros)

    def of_tensors(self, name: str, tensors: Mapping[str, TensorInfo]) -> Self:
        dtype = tensors[name + SCALE].dtype if name + SCALE in tensors else "F32"
        return replace(self, scales="float32" if self.has_zeros else FLOAT_SCALES.get(dtype, "float32"))

    def weight(
        self, values: np.ndarray, scales: np.ndarray, lows: np.ndarray | None, shape: tuple[int, ...]
    ) -> Quantised:
        """Returns a weight of that shape; scales and lows are one for each block."""
        scales = by_row(scales.astype(self.coding.scales), shape, self.block)
        lows = None if lows is None else by_row(lows, shape, self.block)
        return Quantised(values, scales, lows, self.coding, "float32")


@dataclass(frozen=True)
class Int8(ScaledInts):
    """Integers ``[..., out, in]``; zero points are shaped as the scales."""

    name: ClassVar[str] = "int8"

    @property
    def code(self) -> Code:
        return "int8"

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
        return self.weight(values, scales, lows, shape)
