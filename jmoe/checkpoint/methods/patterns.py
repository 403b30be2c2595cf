"""Lists of modules as checkpoints spell them.

An entry is a module's name ("lm_head", "model.layers.0.mlp.gate"), the beginning or the end of one at a dot
("model.layers.0.self_attn", "mlp.gate"), a name with "*", or "re:" and a regular expression. A model inside a
wrapper has a prefix more or less than here ("language_model.model.layers..."), and the experts of a layer may
be named as a whole.
"""

import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

Found = TypeVar("Found")
REGEX = "re:"


def matcher(entry: str) -> Callable[[str], bool]:
    """Returns the function that says whether an entry is about a module; raises ValueError for an entry that
    is no pattern."""
    if entry.startswith(REGEX):
        return _regex(entry)
    if "*" in entry:
        return lambda module: any(fnmatchcase(name, entry) for name in _spellings(module))
    whole = re.compile(rf"(^|.*\.){re.escape(_unwrapped(entry))}(\..*|$)")
    return lambda module: whole.match(_unwrapped(module)) is not None


def _regex(entry: str) -> Callable[[str], bool]:
    try:
        pattern = re.compile(entry.removeprefix(REGEX))
    except re.error as error:
        raise ValueError(f"{entry!r} is not a regular expression: {error}") from None
    return lambda module: any(pattern.match(name) for name in _spellings(module))


def _spellings(module: str) -> tuple[str, ...]:
    """Returns the names under which a list may mean the module."""
    bare = _unwrapped(module)
    return bare, f"model.{bare}", f"language_model.model.{bare}", f"model.language_model.{bare}"


def _unwrapped(name: str) -> str:
    """Returns a name without the models and wrappers in front of it."""
    return re.sub(r"^((model|language_model)\.)+", "", name)


def nearest(table: Mapping[str, Found]) -> Callable[[str], Found | None]:
    """Returns the function from a module to the entry of its own full name, or else of the nearest module
    that it is in. Its time does not grow with the table: some have twenty thousand names."""
    bare = {_unwrapped(name): found for name, found in table.items()}

    def find(module: str) -> Found | None:
        name = _unwrapped(module)
        while name and name not in bare:
            name = name.rpartition(".")[0]
        return bare.get(name)

    return find


def contains(entry: str) -> Callable[[str], bool]:
    """Returns the function that says whether an entry is anywhere in a module's name, as AutoAWQ reads its
    list."""
    return lambda module: any(entry in name for name in _spellings(module))
