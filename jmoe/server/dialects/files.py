"""Formats of calls in files: the fields of ``format.Format`` as TOML, for ``--tool-format FILE``."""

import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec

from jmoe.server.dialects.format import Format, Tagged


def format_file(path: Path) -> Format:
    """Reads a format; ``arguments`` may be a table of the fields of ``Tagged``. Without a ``name`` it has the
    file's. Raises ValueError with one line for a file that is no format."""
    try:
        given = {"name": path.stem} | tomllib.loads(path.read_text(encoding="utf-8"))
        for kind, table in ((Format, given), (Tagged, given.get("arguments"))):
            if isinstance(table, Mapping):
                _check_names(kind, table)
        return msgspec.convert(given, Format)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, TypeError) as error:  # msgspec's and TOML's are ValueErrors
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None


def _check_names(kind: Any, table: Mapping[str, Any]) -> None:
    known = [field.name for field in fields(kind)]
    unknown = [name for name in table if name not in known]
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}; a {kind.__name__} has {', '.join(known)}")
