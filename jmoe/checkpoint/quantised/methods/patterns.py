"""Lists of modules as checkpoints spell them.

An entry is a module's name ("lm_head", "model.layers.0.mlp.gate"), some parts of one between dots
("model.layers.0.self_attn", "mlp.gate"), the same with "*" for any text, or "re:" and a regular expression
for the beginning of a name. A model inside a wrapper has a prefix more or less than here
("language_model.model.layers..."), and the experts of a layer may be named as a whole.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from jmoe.config.reading import shown

Found = TypeVar("Found")
REGEX = "re:"
WRAPPERS = ("", "model.", "language_model.", "language_model.model.", "model.language_model.")


@dataclass(frozen=True)
class Whole:
    """Matches the modules whose names have certain parts, one after the other: a name without "*".

    name: the parts, without a wrapper.
    """

    name: str

    def __call__(self, module: str) -> bool:
        return f".{self.name}." in f".{module}."


def runs(module: str) -> Iterator[str]:
    """Yields the names for which ``Whole`` matches a module."""
    parts = module.split(".")
    for start in range(len(parts)):
        for end in range(start, len(parts)):
            yield ".".join(parts[start : end + 1])


def patterns(config: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """Returns a list of modules, empty if the key is absent; raises ValueError if it is no list of names."""
    entries = config.get(key)
    if entries is None:
        return ()
    if not isinstance(entries, list) or not all(isinstance(each, str) and each for each in entries):
        raise ValueError(f"{key} must be a list of names of modules, got {shown(entries)}")
    return tuple(entries)


def matcher(entry: str) -> Callable[[str], bool]:
    """Returns the function that says whether an entry is about a module; raises ValueError for an entry that
    is no pattern."""
    if entry.startswith(REGEX):
        return _regex(entry)
    if "*" in entry:
        return lambda module: any(
            fnmatchcase(name, pattern) for name in _spellings(module) for pattern in (entry, f"{entry}.*")
        )
    return Whole(_unwrapped(entry))


def _regex(entry: str) -> Callable[[str], bool]:
    try:
        pattern = re.compile(entry.removeprefix(REGEX))
    except re.error as error:
        raise ValueError(f"{entry!r} is not a regular expression: {error}") from None
    return lambda module: any(pattern.match(name) for name in _spellings(module))


def _spellings(module: str) -> tuple[str, ...]:
    """Returns the names under which a list may mean the module."""
    bare = _unwrapped(module)
    return tuple(wrapper + bare for wrapper in WRAPPERS)


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
