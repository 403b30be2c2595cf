"""One GGUF file: its header, parsed and checked before a byte of data is read.

Layout (GGUF specification, versions 2 and 3, little endian): magic, version, numbers of tensors and of
metadata entries, the entries, then each tensor's name, sizes, type and offset, then the data from the next
multiple of the alignment on. The file is never mapped: truncating a mapped file would kill the process.
"""

import io
import math
import os
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from jmoe.checkpoint.safetensors_file import TensorInfo, open_regular
from jmoe.config.units import brief

MAGIC = b"GGUF"
VERSIONS = (2, 3)
HEADER_LIMIT = 256 << 20  # bytes of metadata: vocabularies of 256k tokens take some ten million
MOST_ENTRIES = 1 << 16
MOST_TENSORS = 1 << 20
MOST_AXES, LARGEST = 4, 2**63 - 1
ALIGNMENT = "general.alignment"
LARGEST_ALIGNMENT = 1 << 16

# ggml's types by number: name, numbers of a block, bytes of a block
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
# types of metadata values by number; 8 is a string, 9 an array
SCALARS = {
    0: np.dtype("<u1"), 1: np.dtype("<i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"), 4: np.dtype("<u4"),
    5: np.dtype("<i4"), 6: np.dtype("<f4"), 7: np.dtype("?"), 10: np.dtype("<u8"), 11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}  # fmt: skip
STRING, ARRAY = 8, 9
SHORTEST_ENTRY, SHORTEST_TENSOR, SHORTEST_STRING = 13, 24, 8  # bytes


@dataclass(frozen=True)
class GgufHeader:
    """The part of a file before its data.

    metadata: values by key; an array is a list.
    tensors: every tensor by its name; the last axis of a shape is the contiguous one.
    """

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


class _Cursor:
    """The position in a header. Every method checks a length before it reads."""

    def __init__(self, file: FileIO):
        self.path, self.size = Path(file.name), os.fstat(file.fileno()).st_size
        self.at, self._file = 0, io.BufferedReader(file, 1 << 20)

    def take(self, count: int, what: str) -> bytes:
        left = min(self.size, HEADER_LIMIT) - self.at
        if count > left:
            limit = f" of the limit {HEADER_LIMIT}" if self.size > HEADER_LIMIT else ""
            raise ValueError(f"{self.path}: truncated: {what} needs {count} bytes, {left}{limit} are left")
        raw = self._file.read(count)
        if len(raw) < count:
            raise ValueError(f"{self.path}: truncated: {what} needs {count} bytes, {len(raw)} are left")
        self.at += count
        return raw

    def number(self, size: int, what: str) -> int:
        return int.from_bytes(self.take(size, what), "little")

    def count(self, limit: int, shortest: int, what: str) -> int:
        """Returns the number of things that follow, each of ``shortest`` bytes or more."""
        count, left = self.number(8, what), self.size - self.at
        if count > limit or count * shortest > left:
            raise ValueError(
                f"{self.path}: {what} is {count}; {left} bytes are left, and the limit is {limit}"
            )
        return count

    def text(self, what: str, errors: str = "strict") -> str:
        raw = self.take(self.number(8, what), what)
        try:
            return raw.decode("utf-8", errors)
        except UnicodeDecodeError:
            raise ValueError(f"{self.path}: {what} is not UTF-8: {raw[:40]!r}") from None

    def detach(self) -> None:
        self._file.detach()


def read_header(file: FileIO) -> GgufHeader:
    """Returns a file's header; raises ValueError, naming the file, for anything out of order."""
    cursor = _Cursor(file)
    try:
        if cursor.size < 24 or cursor.take(4, "magic") != MAGIC:
            raise ValueError(f"{cursor.path}: not a GGUF file: it does not begin with {MAGIC.decode()}")
        _check_version(cursor, cursor.number(4, "version"))
        tensors = cursor.count(MOST_TENSORS, SHORTEST_TENSOR, "the number of tensors")
        entries = cursor.count(MOST_ENTRIES, SHORTEST_ENTRY, "the number of metadata entries")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = cursor.text("a metadata key")
            if key in metadata:
                raise ValueError(f"{cursor.path}: the metadata has {brief(key)} twice")
            metadata[key] = _value(cursor, cursor.number(4, brief(key)), brief(key))
        return GgufHeader(metadata, _tensors(cursor, tensors, _alignment(cursor.path, metadata)))
    finally:
        cursor.detach()


def open_gguf(path: Path) -> tuple[FileIO, GgufHeader]:
    """Opens a file and reads its header; raises ValueError naming the file."""
    file = open_regular(path)
    try:
        return file, read_header(file)
    except BaseException:
        file.close()
        raise


def _check_version(cursor: _Cursor, version: int) -> None:
    if version in VERSIONS:
        return
    if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
        raise ValueError(f"{cursor.path}: is big endian; little endian files are read")
    read = " and ".join(map(str, VERSIONS))
    raise ValueError(f"{cursor.path}: has GGUF version {version}; versions {read} are read")


def _value(cursor: _Cursor, kind: int, what: str) -> Any:
    if kind in SCALARS:
        return _python(np.frombuffer(cursor.take(SCALARS[kind].itemsize, what), SCALARS[kind])[0])
    if kind == STRING:
        return cursor.text(what, "replace")
    if kind != ARRAY:
        raise ValueError(f"{cursor.path}: {what} has the value type {kind}, which is unknown")
    kind = cursor.number(4, what)
    if kind == STRING:
        count = cursor.count(HEADER_LIMIT, SHORTEST_STRING, f"the length of {what}")
        return [cursor.text(what, "replace") for _ in range(count)]
    if kind not in SCALARS:
        raise ValueError(f"{cursor.path}: {what} is an array of the value type {kind}, which is not read")
    count = cursor.count(HEADER_LIMIT, SCALARS[kind].itemsize, f"the length of {what}")
    return np.frombuffer(cursor.take(count * SCALARS[kind].itemsize, what), SCALARS[kind]).tolist()


def _python(value: Any) -> Any:
    """Returns a scalar as Python has it; a float32 as the shortest decimal that means it: 1e-06, as
    ``config.json`` has it, and not 9.999999974752427e-07."""
    return float(str(value)) if value.dtype == np.float32 else value.item()


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    value = metadata.get(ALIGNMENT, 32)
    if type(value) is not int or not 1 <= value <= LARGEST_ALIGNMENT or value & (value - 1):
        raise ValueError(f"{path}: {ALIGNMENT} must be a power of two to {LARGEST_ALIGNMENT}, got {value!r}")
    return value


def _tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, TensorInfo]:
    entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name = cursor.text("a tensor's name")
        if name in entries:
            raise ValueError(f"{cursor.path}: tensor {brief(name)} is there twice")
        entries[name] = _tensor(cursor, name)
    start, found, end = -(-cursor.at // alignment) * alignment, {}, 0
    for name, (kind, shape, nbytes, offset) in sorted(entries.items(), key=lambda each: each[1][3]):
        where = f"{cursor.path}: tensor {brief(name)}"
        if offset % alignment:
            raise ValueError(f"{where} has offset {offset}, not a multiple of the alignment {alignment}")
        if offset < end:
            raise ValueError(f"{where} begins at {offset}, before the end of the tensor before it, {end}")
        end = offset + nbytes
        if start + end > cursor.size:
            raise ValueError(
                f"{where} ends at byte {start + end}, the file has {cursor.size} (truncated download?)"
            )
        found[name] = TensorInfo(cursor.path, kind, shape, start + offset, nbytes)
    return found


def _tensor(cursor: _Cursor, name: str) -> tuple[str, tuple[int, ...], int, int]:
    """Returns a tensor's type, shape, bytes and offset."""
    what = f"tensor {brief(name)}"
    axes = cursor.number(4, what)
    if not 1 <= axes <= MOST_AXES:
        raise ValueError(f"{cursor.path}: {what} has {axes} axes; the limit is {MOST_AXES}")
    shape = tuple(cursor.number(8, what) for _ in range(axes))[::-1]
    number, offset = cursor.number(4, what), cursor.number(8, what)
    if number not in TYPES:
        raise ValueError(f"{cursor.path}: {what} has the type {number}, which is unknown")
    kind, numbers, nbytes = TYPES[number]
    if min(shape) < 1 or math.prod(shape) > LARGEST:
        raise ValueError(f"{cursor.path}: {what} has the sizes {list(shape)}")
    if shape[-1] % numbers:
        raise ValueError(
            f"{cursor.path}: {what} has rows of {shape[-1]} numbers, {kind} has blocks of {numbers}"
        )
    return kind, shape, math.prod(shape) // numbers * nbytes, offset
