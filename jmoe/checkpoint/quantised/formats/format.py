"""The declaration of a format: the tensors that store a parameter's numbers, and the way to read them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from jmoe_kernels.quantised import Coding, Quantised

from jmoe.checkpoint.checkpoint import Checkpoint
from jmoe.checkpoint.safetensors_file import ARRAY_DTYPES, TensorInfo
from jmoe.config.units import brief
from jmoe.models.weights import StoredTensor


@dataclass(frozen=True)
class StoredEntry:
    """One tensor that is read, and the form that it must have.

    name: name of the tensor.
    shape: shape of the tensor, or of one entry if it is stacked.
    dtypes: names of the allowed dtypes in the file.
    """

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Format(ABC):
    """One way to store numbers; its fields are the numbers that ``config.json`` gives it.

    A subclass is a frozen dataclass; ``name`` is what messages call it.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def coding(self) -> Coding | None:
        """The coding in which a weight of this format is kept in memory; None keeps its numbers, dequantised
        while it loads."""

    @property
    def why_dequantised(self) -> str:
        """The reason for a ``coding`` of None, for messages."""
        return ""

    @abstractmethod
    def entries(self, name: str, shape: tuple[int, ...]) -> tuple[StoredEntry, ...]:
        """Returns what is read from each tensor that stores a weight.

        name: name that the weight has if it is not quantised, such as ``....q_proj.weight``.
        shape: shape of the numbers, ``[..., out, in]``.
        Raises ValueError naming the tensor if the format cannot store such a shape.
        """

    @abstractmethod
    def tensor_names(self, name: str) -> tuple[str, ...]:
        """Returns the names of the tensors that store a weight; the first holds the codes."""

    def zero_biases(self, name: str) -> tuple[str, ...]:
        """Returns the names of biases that a writer adds to a weight even if its model has none: zeros."""
        return ()

    def of_tensors(self, name: str, tensors: Mapping[str, TensorInfo]) -> Self:
        """Returns the format with what only the tensors of a weight say, such as the dtype of its scales."""
        return self

    def of_contents(self, checkpoint: Checkpoint, name: str) -> Self:
        """Returns the format with what only the numbers in its tensors say. The tensors are not checked yet:
        any may be missing or wrong."""
        return self

    @abstractmethod
    def read(self, checkpoint: Checkpoint, name: str, entry: int | None, shape: tuple[int, ...]) -> Quantised:
        """Returns a weight as numpy arrays, in its coding (any, if that is None) and computed in float32.

        entry: entry of the leading axis of stacked tensors; None reads whole tensors.
        shape: shape of the numbers, ``[..., out, in]``.
        Raises ValueError naming the tensor for a scale that is NaN or Inf.
        """


@dataclass(frozen=True)
class StoredParam(StoredTensor):
    """A tensor of a checkpoint with its format, and the slice of a parameter that it fills.

    format: how the numbers are stored.
    """

    format: Format | None = None  # None: plain numbers

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors in the checkpoint."""
        return (self.name,) if self.format is None else self.format.tensor_names(self.name)


def read_array(checkpoint: Checkpoint, entry: StoredEntry, part: int | None) -> np.ndarray:
    """Returns a tensor, or one entry of its leading axis, in the dtype of the file."""
    info = checkpoint.tensors[entry.name]
    count = int(np.prod(entry.shape, dtype=np.int64))
    raw = checkpoint.read_bytes(entry.name, info.dtype, (part or 0) * count, count)
    return raw.view(ARRAY_DTYPES[info.dtype]).reshape(entry.shape)


def check_finite(checkpoint: Checkpoint, name: str, scales: np.ndarray, what: str = "scale") -> None:
    """Raises ValueError naming the tensor if a scale is NaN or Inf."""
    if not np.isfinite(scales.astype(np.float32)).all():
        file = checkpoint.tensors[name].file
        raise ValueError(f"{file}: tensor {brief(name)} has a {what} that is NaN or Inf")
