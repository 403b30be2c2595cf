"""Converts values from files, flags and Python to the types that a dataclass declares, with one form of
message:

    FILE: table.key must be an integer of at least 1, got '8000'

The annotations of a dataclass are the declaration; msgspec checks values by them, and ``words`` puts them
into words. Text never becomes a number, and a fraction or boolean never becomes an integer.
"""

import difflib
import json
import math
import re
import reprlib
import tomllib
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from jmoe.config.units import parse_size

FILE_LIMIT = 1 << 20  # bytes of a settings file
PATH_LIMIT = 400  # characters of a file name in a message; longer text is not a real file name
Table = TypeVar("Table")

Natural = Annotated[int, Meta(ge=0)]
AtLeastOne = Annotated[int, Meta(ge=1)]
# the device computes in float32, in which the value must be neither 0 nor infinite
Positive = Annotated[
    float,
    Meta(ge=2.0**-126, le=2.0**127, description="a finite number above 0", extra={"float32": True}),
]
Secret = Annotated[str, Meta(extra={"secret": True})]  # not shown in messages
Size = Annotated[int, Meta(ge=1, extra={"size": True})]  # bytes, or text such as "2GiB"


def typed(name: str, value: Any, kind: Any) -> Any:
    """Returns ``value`` as the declared type; if it does not fit, raises a ValueError that begins with
    ``name``.

    Numbers must be finite. Lists become tuples, text of a ``Size`` becomes a number of bytes, and numpy
    numbers become Python numbers.
    """
    if hasattr(value, "dtype") and getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, str) and _is_marked(kind, "size"):
        value = parse_size(name, value)
    try:
        got = msgspec.convert(value, kind, strict=True)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ValueError(_refusal(name, value, kind, str(error))) from None
    for i, each in enumerate(got if isinstance(got, tuple) else (got,)):
        if isinstance(each, float) and not math.isfinite(each):
            raise ValueError(_refusal(name, value, kind, f" - at `$[{i}]`" if got is not each else ""))
    return got


def check_fields(instance: Any, prefix: str = "") -> None:
    """Converts every field of a dataclass to its declared type; for ``__post_init__``.

    prefix: prefix of the fields' names in a message. A field declared as a dataclass must already be one.
    """
    for name, kind in hints(type(instance)).items():
        value, table = getattr(instance, name), _table(kind)
        if table is None:
            object.__setattr__(instance, name, typed(prefix + name, value, kind))
        elif not isinstance(value, kind):
            what = f"a {table.__name__}" + (" or None" if isinstance(None, kind) else "")
            raise ValueError(f"{prefix}{name} must be {what}, got {shown(value)}")


def from_table(
    cls: type[Table], values: Any, table_name: str, prefix: str, excluded: tuple[str, ...] = ()
) -> Table:
    """Returns the dataclass ``cls`` from a table of a file; nested tables become dataclasses too.

    table_name: name of the table in messages.
    prefix: prefix of its keys in messages.
    excluded: fields that are not keys.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{table_name} must be a table of keys, got {type(values).__name__}")
    kinds = {name: kind for name, kind in hints(cls).items() if name not in excluded}
    check_keys(table_name, values, kinds)
    required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]  # pyright: ignore[reportArgumentType]
    for name in required:
        if name not in values:
            raise ValueError(f"{table_name} has no {name!r}")
    fields_by_name = {}
    for name, value in values.items():
        table = _table(kinds[name])
        if table is not None and value is not None:
            value = from_table(table, value, prefix + name, f"{prefix}{name}.")
        fields_by_name[name] = value
    return cls(**fields_by_name)


def check_keys(name: str, values: Iterable[Any], known_keys: Iterable[str]) -> None:
    """Raises ValueError that names the first unknown key and the nearest known one."""
    known_keys = list(known_keys)
    for key in values:
        if key not in known_keys:
            near = difflib.get_close_matches(str(key)[:100], known_keys, n=1, cutoff=0.0)
            raise ValueError(f"{name}: unknown key {shown(key)}; nearest known key: {near[0]!r}")


@lru_cache
def hints(cls: type) -> dict[str, Any]:
    """Returns the declared type of each field of a dataclass."""
    declared = get_type_hints(cls, include_extras=True)
    return {field.name: declared[field.name] for field in fields(cls)}  # pyright: ignore[reportArgumentType]


# ---- messages --------------------------------------------------------------------------------------


def words(kind: Any) -> str:
    """Returns the declared type in words that can follow "must be"."""
    if get_origin(kind) is Annotated:
        meta = next(iter(_metas(kind)), Meta())
        return meta.description or words(kind.__origin__) + _bounds(meta)
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) in (Union, types.UnionType):
        several = [each for each in get_args(kind) if each is not type(None)]
        if all(get_origin(each) is Literal for each in several):
            choices = [str(choice) for each in several for choice in get_args(each)]
            return "one of " + ", ".join(["None"] * (len(several) < len(get_args(kind))) + choices)
        return " or ".join(map(words, several))
    if get_origin(kind) is tuple:
        return "a list"
    names = {int: "an integer", float: "a finite number", bool: "true or false", str: "text"}
    return names.get(kind, "a table of keys")


def shown(value: Any) -> str:
    """Returns a value as text for a message: one short line, even if the value is long or deep."""
    return _SHORT.repr(value).replace("\n", " ")


class _Short(reprlib.Repr):
    """A ``Repr`` that also shows huge integers, whose text of thousands of digits Python refuses to make."""

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 128 else f"an integer of {x.bit_length()} bits"


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlevel = 3


def _refusal(name: str, value: Any, kind: Any, cause: str) -> str:
    """Returns the message of a refused value.

    cause: message of msgspec, which ends with the position of the wrong list entry.
    """
    for index in re.findall(r"\[(\d+)\]", cause.rpartition(" - at `$")[2]):
        if isinstance(value, list | tuple):
            name, value, kind = f"{name}[{index}]", value[int(index)], _entry(kind)
    limit = next((meta.le for meta in _metas(kind) if meta.description and meta.le is not None), None)
    if type(value) is int and limit is not None and value > limit:
        return f"{name} {shown(value)} exceeds {limit}"
    small = _is_marked(kind, "float32") and type(value) in (int, float) and 0 < value < math.inf
    got = type(value).__name__ if _is_marked(kind, "secret") else shown(value)
    return f"{name} must be {words(kind)}, got {got}" + " (in float32)" * small


def _entry(kind: Any) -> Any:
    """Returns the declared type of a list's entries."""
    lists = [each for each in (kind, *get_args(kind)) if get_origin(each) is tuple]
    return get_args(lists[0])[0]


def _bounds(meta: Meta) -> str:
    if meta.ge is not None and meta.le is not None:
        return f" from {meta.ge} to {meta.le}"
    limits = (("above", meta.gt), ("of at least", meta.ge), ("below", meta.lt), ("of at most", meta.le))
    return "".join(f" {word} {limit}" for word, limit in limits if limit is not None)


def _is_marked(kind: Any, mark: str) -> bool:
    return any(mark in (meta.extra or {}) for meta in _metas(kind))


def _metas(kind: Any) -> Iterator[Meta]:
    """Yields the bounds of a declared type, and of its alternatives."""
    for each in (kind, *get_args(kind)):
        yield from (meta for meta in getattr(each, "__metadata__", ()) if isinstance(meta, Meta))


def _table(kind: Any) -> type | None:
    """Returns the dataclass in a declared type, alone or as an alternative; None if there is none."""
    return next((each for each in (kind, *get_args(kind)) if is_dataclass(each)), None)  # pyright: ignore


# ---- files -----------------------------------------------------------------------------------------


def read_toml(path: Path) -> dict[str, Any]:
    """Returns the tables of a TOML file; a ValueError names the file if it is absent or malformed."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no regular file")
        with path.open("rb") as file:
            raw = file.read(FILE_LIMIT + 1)
        if len(raw) > FILE_LIMIT:
            raise ValueError(f"it has more than {FILE_LIMIT} bytes")
        return tomllib.loads(raw.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        cause = error.strerror if isinstance(error, OSError) else str(error)[:300]
        name = str(path) if len(str(path)) <= PATH_LIMIT else shown(str(path))
        raise ValueError(" ".join(f"cannot read {name}: {cause}".split())) from None


def unique_json(text: str) -> Any:
    """Parses a JSON text in which no object has a key twice; a ValueError says what is wrong with it."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in pairs:
            if key in out:
                raise ValueError(f"{shown(key)} is given twice")
            out[key] = value
        return out

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


@contextmanager
def named(name: object) -> Iterator[None]:
    """Makes ValueErrors that are raised within the context begin with ``name``."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
