"""One safetensors file: its header, parsed and checked before a byte of data is read, and its writer.

Layout (safetensors format): 8 bytes little-endian header length, the header as JSON, the data. The header
gives each tensor's dtype, shape and ``[begin, end)`` in the data. The checks are ours because the public
reader accepts duplicate names and never says which file is bad.
"""

import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jmoe.config.reading import unique_json
from jmoe.config.units import brief

HEADER_LIMIT = 100_000_000  # bytes; the public reader's limit, used for an index too
MOST_AXES, LARGEST = 32, 2**63 - 1  # limits of a shape: an absurd product would take forever
JSON_LIMIT = 16 << 20  # bytes of a config.json: the longest published ones have some hundred thousand
ALIGN = 64  # bytes; XLA on CPU uses host memory in place only where it starts at a multiple of this

DTYPES: dict[str, np.dtype | None] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
}
ITEM_SIZES = {name: dtype.itemsize for name, dtype in DTYPES.items() if dtype is not None} | {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8, "C64": 8,
}  # fmt: skip
# the dtypes of tensors that formats of quantised numbers consist of
ARRAY_DTYPES: dict[str, np.dtype] = {name: dtype for name, dtype in DTYPES.items() if dtype is not None} | {
    "U8": np.dtype(np.uint8), "I8": np.dtype(np.int8), "I32": np.dtype(np.int32), "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E8M0": np.dtype(np.uint8),
}  # fmt: skip

_OTHER_FORMATS = (
    (b"version https://git-lfs", "a git-LFS pointer, not the data: run 'git lfs pull' where it was cloned"),
    (b"PK\x03\x04", "a zip archive (a PyTorch .bin/.pt renamed?)"),
    (b"\x80", "a Python pickle, which is never opened"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"<", "an HTML or XML page, not a download of the file"),
    (b"{", "a JSON text"),
)


@dataclass(frozen=True)
class TensorInfo:
    """The place and the form of a tensor in a file.

    file: path of the file.
    dtype: name of the dtype in the file.
    shape: shape of the tensor.
    offset: start of its data in the file, bytes.
    nbytes: size of its data, bytes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def open_regular(path: Path) -> FileIO:
    """Opens the file unbuffered; raises ValueError if it is absent or not a regular file."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise ValueError(f"{path}: not a regular file")
        return FileIO(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None


def read_exactly(file: FileIO, offset: int, out: memoryview) -> None:
    """Fills ``out`` from ``offset``; raises ValueError if the file ends before. It never maps the file:
    truncating a mapped file would kill the process with SIGBUS. Threads may read one file at once: none moves
    its position."""
    got = 0
    while got < len(out):
        step = os.preadv(file.fileno(), [out[got:]], offset + got)
        if not step:
            raise ValueError(
                f"{file.name}: truncated: {offset + len(out)} bytes are needed, {offset + got} are there"
            )
        got += step


def read_header(file: FileIO) -> dict[str, TensorInfo]:
    """Returns every tensor of the file by name; raises ValueError, naming the file, for anything out of
    order."""
    path, size = Path(file.name), os.fstat(file.fileno()).st_size
    head = bytearray(min(size, 64))
    read_exactly(file, 0, memoryview(head))
    length = int.from_bytes(head[:8], "little")
    if size < 10 or not 2 <= length <= min(HEADER_LIMIT, size - 8) or head[8:9] != b"{":
        raise ValueError(f"{path}: not a safetensors file: {_describe(bytes(head), size, length)}")
    raw = bytearray(length)
    read_exactly(file, 8, memoryview(raw))
    entries = parse_json(raw, f"{path}: header")
    entries.pop("__metadata__", None)
    tensors = {name: _entry(path, name, entry, 8 + length) for name, entry in entries.items()}
    _check_layout(path, tensors, 8 + length, size)
    return tensors


def read_json(path: Path, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """Returns the JSON object of a file; raises ValueError if it is absent, longer than ``limit`` or
    damaged."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"{path}: has {size} bytes, more than the limit {limit}")
        raw = bytearray(size)
        read_exactly(file, 0, memoryview(raw))
    return parse_json(raw, str(path))


def parse_json(raw: bytes | bytearray, name: str) -> dict[str, Any]:
    """Returns a JSON object in which no key is repeated; otherwise raises a ValueError whose message begins
    with ``name``."""
    try:
        value = unique_json(raw.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{name} is damaged JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object, it is {type(value).__name__}")
    return value


def _describe(head: bytes, size: int, length: int) -> str:
    if size < 10:
        return f"it has {size} bytes"
    for magic, what in _OTHER_FORMATS:
        if head.lstrip().startswith(magic):
            return f"it is {what}"
    if head[8:9] != b"{":
        return f"it starts with {head[:16]!r}"
    if length <= HEADER_LIMIT:
        return f"its header needs {8 + length} bytes, the file has {size} (truncated?)"
    return f"its header length {length} exceeds the limit {HEADER_LIMIT}"


def _entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    where = f"{path}: tensor {brief(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} must have exactly dtype, shape and data_offsets")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise ValueError(f"{where} has unknown dtype {brief(dtype)}")
    for what, numbers in (("shape", shape), ("data_offsets", span)):
        if not isinstance(numbers, list) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(f"{where}: {what} must be a list of integers >= 0")
        if len(numbers) > MOST_AXES or any(n > LARGEST for n in numbers):
            raise ValueError(f"{where}: {what} must be at most {MOST_AXES} integers up to {LARGEST}")
    if len(span) != 2 or span[1] < span[0]:
        raise ValueError(f"{where}: data_offsets must be [begin, end], got {brief(span)}")
    need = math.prod(shape) * ITEM_SIZES[dtype]
    if span[1] - span[0] != need:
        raise ValueError(
            f"{where}: {dtype} {brief(shape)} needs {need} bytes, its offsets span {span[1] - span[0]}"
        )
    return TensorInfo(path, dtype, tuple(shape), data_start + span[0], need)


def _check_layout(path: Path, tensors: Mapping[str, TensorInfo], data_start: int, size: int) -> None:
    """Raises ValueError unless tensors follow one another without gap or overlap and end where the file
    ends."""
    at, before = data_start, "the header"
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != at:
            wrong = "overlaps" if info.offset < at else "leaves a gap after"
            raise ValueError(f"{path}: tensor {brief(name)} {wrong} {before}")
        at, before = info.offset + info.nbytes, brief(name)
    if at != size:
        wrong = "truncated" if at > size else "bytes after the last tensor"
        raise ValueError(f"{path}: {wrong}: its header describes {at} bytes, the file has {size}")


def encode_header(entries: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """Returns the length and header for (name, dtype, shape) in data order, padded so that data starts
    64-aligned."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape in entries:
        end = at + math.prod(shape) * ITEM_SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % ALIGN)
    return len(raw).to_bytes(8, "little") + raw
