"""Versioned ``.npz`` files of arrays: written whole or not at all, read without unpickling; a bad file is
rejected with a one-line message."""

import math
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

from jmoe.config.units import cause

HEADER = 10_240  # bytes; every array's description is shorter
COMPRESSIONS = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
# The most that a file may expand to: this many times its size, or this many bytes if that is more.
EXPANSION, ANY_SIZE = 64, 16 << 20


def check_writable(path: Path) -> None:
    """Raises ValueError if there is no folder for ``path`` or if ``path`` is a folder. A caller uses it so
    that this fails before the work."""
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise ValueError(f"{path} cannot be written: it must be a file in a folder that exists")


def save_arrays(path: Path, form: str, arrays: Mapping[str, object]) -> None:
    """Writes ``arrays`` (numbers and strings are allowed too) under the format name ``form``."""
    found = {"format": np.asarray(form)} | {k: np.asarray(v) for k, v in arrays.items()}
    with replacing(path) as file:  # with a path instead, numpy would add an ending
        np.savez_compressed(file, allow_pickle=False, **found)
        if sum(a.nbytes + HEADER for a in found.values()) > _size_limit(file.tell()):  # nearly all zeros
            file.seek(0)
            file.truncate()
            np.savez(file, allow_pickle=False, **found)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yields a file next to ``path`` that replaces it once it is whole on the disk. If the writing
    ends earlier, even by a kill, ``path`` keeps its previous file."""
    path = path.resolve()  # a link stays a link
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def saved_arrays(path: Path, kind: str, form: str) -> Iterator[Mapping[str, np.ndarray]]:
    """Yields the arrays, read-only, of a file that ``save_arrays`` wrote.

    A file that is absent, malformed or of another kind raises a ValueError that names the file. So does a
    missing array or any other exception inside the ``with``: which exception a damaged file raises depends on
    the damage.
    """
    try:
        arrays = _read(path)
        if str(arrays["format"]) != form:
            raise ValueError(f"format {str(arrays['format'])[:100]!r}, this release reads {form!r}")
        yield arrays
    except KeyError as error:
        raise ValueError(f"{path} is not a {kind}: {error.args[0]}") from None
    except OSError as error:
        raise ValueError(f"cannot read the {kind} {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"cannot read the {kind} {path}: {' '.join(str(error).split())[:300]}") from None
    except Exception as error:
        raise ValueError(f"cannot read the {kind} {path}: {cause(error)}") from None


def _read(path: Path) -> dict[str, np.ndarray]:
    """Reads every array by name. No memory is allocated before the arrays' size is checked against the
    file's."""
    if not path.is_file():
        raise ValueError("it is no file" if path.exists() else "there is no such file")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        total, most = sum(m.file_size for m in members), _size_limit(path.stat().st_size)
        if total > most:
            raise ValueError(f"its arrays would take {total} bytes, more than {most}")
        if any(m.compress_type not in COMPRESSIONS for m in members):  # others take memory by their settings
            raise ValueError("it is compressed in another way than by deflate")
        if len({m.filename.removesuffix(".npy") for m in members}) < len(members):
            raise ValueError("it has two arrays of one name")
        return {m.filename.removesuffix(".npy"): _array(archive, m) for m in members}


def _size_limit(file_size: int) -> int:
    """Returns the most bytes that the arrays of a file of ``file_size`` bytes may take."""
    return max(ANY_SIZE, EXPANSION * file_size)


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as file:
        raw = file.read(member.file_size)  # less if the member is shorter than the archive says
    head = BytesIO(raw[:HEADER])
    version = npy.read_magic(head)
    if version != (1, 0):
        raise ValueError(f"array {member.filename!r} has version {version} of its format")
    shape, by_columns, dtype = npy.read_array_header_1_0(head)
    count, at = math.prod(shape), head.tell()
    if dtype.hasobject or min(shape, default=0) < 0 or count * dtype.itemsize != len(raw) - at:
        raise ValueError(f"array {member.filename!r} of {dtype} {list(shape)} has {len(raw) - at} bytes")
    flat = np.frombuffer(raw, dtype, count, at) if count * dtype.itemsize else np.zeros(count, dtype)
    return flat.reshape(shape, order="F" if by_columns else "C")
