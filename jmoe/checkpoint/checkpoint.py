"""The tensors of a model's files, of any kind, read straight into numpy buffers."""

import math
import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

import ml_dtypes
import numpy as np

from jmoe.checkpoint.safetensors_file import (
    ALIGN,
    DTYPES,
    ITEM_SIZES,
    TensorInfo,
    read_exactly,
)
from jmoe.config.model import ModelConfig
from jmoe.config.units import brief
from jmoe.models.weights import StoredTensor

HUGE_PAGE = 2 << 20  # bytes
CHUNK = 1 << 20  # bytes; a chunk is scanned while it is still in the L2 cache
# dtype -> (unsigned view, signed view, bits of +Inf); all values from +Inf's bits up are Inf or NaN
_BITS = {
    np.dtype(np.float32): (np.uint32, np.int32, 0x7F800000),
    np.dtype(ml_dtypes.bfloat16): (np.uint16, np.int16, 0x7F80),
}


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an uninitialised C-order array that starts at a multiple of 64 bytes, as zero-copy placement
    needs.

    Large arrays use huge pages if the system has them: two cores then read weights a quarter faster.
    """
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared memory would not get them
        memory = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=private)
        memory.madvise(mmap.MADV_HUGEPAGE)
        raw, multiple = np.frombuffer(memory, np.uint8), HUGE_PAGE
    else:
        raw, multiple = np.empty(nbytes + ALIGN, np.uint8), ALIGN
    start = -raw.ctypes.data % multiple
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def all_finite(values: np.ndarray) -> bool:
    """Returns whether a flat float32 or bfloat16 array has no NaN or Inf. It uses two integer maxima and no
    temporary array.

    As signed integers, positive NaN and Inf are the largest values; as unsigned integers, the negative ones.
    """
    unsigned, signed, infinity = _BITS[values.dtype]
    if not values.size:
        return True
    sign = 1 << (8 * values.dtype.itemsize - 1)
    return bool(values.view(signed).max() < infinity and values.view(unsigned).max() < sign + infinity)


class Checkpoint(ABC):
    """The tensors of a model's files, opened; use it in a ``with`` statement. The constructor raises
    ValueError naming the file or tensor that is wrong.

    directory: path of the model.
    tensors: every tensor by its name.
    """

    item_sizes: ClassVar[Mapping[str, int]] = ITEM_SIZES  # bytes of a value, by the name of its dtype

    def __init__(self, directory: Path | str):
        self.directory = Path(directory)
        self._files: dict[Path, FileIO] = {}
        try:
            self.tensors = self._open()
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _open(self) -> dict[str, TensorInfo]:
        """Opens every file; returns its tensors."""

    @property
    @abstractmethod
    def sizes_source(self) -> str:
        """The name of the file or metadata with the sizes of the model, for messages."""

    @abstractmethod
    def names(self, cfg: ModelConfig) -> Iterator[StoredTensor]:
        """Yields every tensor of the model once, or every entry of a stacked tensor, as this checkpoint names
        it."""

    @abstractmethod
    def is_ignored(self, cfg: ModelConfig, name: str) -> bool:
        """Returns whether the checkpoint may have a further tensor of that name, which is then not read."""

    def read_into(self, name: str, out: np.ndarray, part: int | None = None) -> None:
        """Reads a tensor, or one entry of its leading axis, into ``out`` (C-order, see ``read_run``)."""
        info = self.tensors[name]
        shape = info.shape if part is None else info.shape[1:]
        if out.shape != shape or not out.flags.c_contiguous:
            raise ValueError(
                f"{info.file}: tensor {brief(name)} is {list(shape)}, asked as {list(out.shape)}"
            )
        self.read_run(name, (part or 0) * out.size, out.reshape(-1))

    def read_run(self, name: str, start: int, out: np.ndarray) -> None:
        """Reads the values of a tensor from the ``start``-th on, in C order, as many as ``out`` holds.

        Values are converted if the dtypes differ. It raises ValueError for NaN or Inf (in the file, or from
        overflow in the conversion), a truncated file or an unsupported dtype.

        out: flat array, float32 or bfloat16.
        """
        info = self.tensors[name]
        source = DTYPES.get(info.dtype)
        if source is None:
            known = ", ".join(DTYPES)
            raise ValueError(f"{info.file}: tensor {brief(name)} has dtype {info.dtype}; supported: {known}")
        file, step = self._files[info.file], CHUNK // source.itemsize
        offset = self._offset(info, name, start, out.size, source.itemsize)
        scratch = None if source == out.dtype else np.empty(min(step, out.size), source)
        for at in range(0, out.size, step):
            chunk = out[at : at + step]
            target = chunk if scratch is None else scratch[: chunk.size]
            read_exactly(file, offset + at * source.itemsize, target.view(np.uint8).data)
            if scratch is not None:
                with np.errstate(over="ignore", invalid="ignore"):
                    chunk[...] = target
            if not all_finite(chunk):
                raise ValueError(f"{info.file}: tensor {brief(name)} has NaN or Inf (as {out.dtype})")

    def read_bytes(self, name: str, dtype: str, start: int, count: int) -> np.ndarray:
        """Returns the bytes of ``count`` values of a tensor as they are stored, from the ``start``-th value
        on.

        dtype: name of their dtype in the file; ValueError if the tensor has another.
        """
        info, itemsize = self.tensors[name], self.item_sizes[dtype]
        if info.dtype != dtype:
            raise ValueError(f"{info.file}: tensor {brief(name)} has dtype {info.dtype}; supported: {dtype}")
        out = np.empty(count * itemsize, np.uint8)
        read_exactly(self._files[info.file], self._offset(info, name, start, count, itemsize), out.data)
        return out

    @staticmethod
    def _offset(info: TensorInfo, name: str, start: int, count: int, itemsize: int) -> int:
        """Returns the offset of an element from the file's start; raises ValueError if the tensor has too few
        elements."""
        if start < 0 or (start + count) * itemsize > info.nbytes:
            values = info.nbytes // itemsize
            raise ValueError(
                f"{info.file}: tensor {brief(name)} has {values} values, asked for those to {start + count}"
            )
        return info.offset + start * itemsize

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
