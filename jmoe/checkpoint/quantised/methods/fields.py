"""Readers of single values of a ``quantization_config``; each names the key that is wrong."""

from collections.abc import Mapping
from typing import Any

from jmoe.config.reading import shown

Config = Mapping[str, Any]
REQUIRED = object()


def first(config: Config, *names: str, default: Any = REQUIRED) -> Any:
    """Returns the value of the first key that is there and not null; without a default one must be."""
    for name in names:
        if config.get(name) is not None:
            return config[name]
    if default is REQUIRED:
        raise ValueError(f"{' or '.join(names)} is absent")
    return default


def one_of(config: Config, *names: str, read: tuple[Any, ...], default: Any = REQUIRED) -> Any:
    """Returns a value that must be one of those that are read."""
    value = first(config, *names, default=default)
    if not any(type(value) is type(each) and value == each for each in read):
        raise ValueError(f"{names[0]} {shown(value)} is not read; read: {', '.join(map(repr, read))}")
    return value


def flag(config: Config, name: str, *, default: bool) -> bool:
    """Returns a value that must be true or false."""
    return one_of(config, name, read=(True, False), default=default)


def group_size(config: Config, *names: str) -> int | None:
    """Returns the numbers of a row that share a scale, or None if the whole row does (-1 in the file)."""
    size = first(config, *names)
    if type(size) is not int or (size < 1 and size != -1):
        raise ValueError(f"{names[0]} must be -1 or at least 1, got {shown(size)}")
    return None if size == -1 else size


def table(config: Config, name: str) -> Mapping[str, Any]:
    """Returns a value that must be an object; empty if it is absent."""
    value = first(config, name, default={})
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be an object, got {shown(value)}")
    return value


def names_in(config: Config, *names: str) -> tuple[str, ...]:
    """Returns the texts of a list, or of a list of lists, empty if it is absent. A text alone is a list whose
    entries are separated by commas."""
    value = first(config, *names, default=())
    entries = value.split(",") if isinstance(value, str) else value
    if isinstance(entries, list | tuple):
        flat = [each for entry in entries for each in (entry if isinstance(entry, list) else [entry])]
        if all(isinstance(entry, str) for entry in flat):
            return tuple(entry.strip() for entry in flat)
    raise ValueError(f"{names[0]} must be a list of names, got {shown(value)}")
