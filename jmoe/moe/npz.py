"""Versioned ``.npz`` files of arrays: written whole or not at all, read without unpickling, refused in one
line."""

import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np


def check_writable(path: Path) -> None:
    """Raises ValueError where there is no folder for ``path``: before the work, not after it."""
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise ValueError(f"{path} cannot be written: it must be a file in a folder that exists")


def save_arrays(path: Path, form: str, arrays: Mapping[str, object]) -> None:
    """Writes ``arrays``, numbers and strings among them, under the format name ``form``."""
    with replacing(path) as file:  # by its path, numpy would add an ending
        np.savez_compressed(
            file, allow_pickle=False, format=form, **{k: np.asarray(v) for k, v in arrays.items()}
        )


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file beside ``path`` that takes its place once it is whole on the disk. Whatever ends the writing
    before that, a kill too, leaves at ``path`` what was there."""
    path = path.resolve()  # a link stays one
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def saved_arrays(path: Path, what: str, form: str) -> Iterator[Mapping[str, np.ndarray]]:
    """The arrays of a file that ``save_arrays`` wrote. Inside the ``with``, a missing array or a ValueError
    becomes a ValueError that names the file, as does a file that is absent, malformed or something else."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if str(arrays["format"]) != form:
                raise ValueError(f"format {str(arrays['format'])!r}, this release reads {form!r}")
            yield arrays
    except KeyError as error:
        raise ValueError(f"{path} is not a {what}: {error.args[0]}") from None
    except (OSError, EOFError, TypeError, AttributeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"cannot read the {what} {path}: {error}") from None
