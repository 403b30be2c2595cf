"""The declaration of a method: the reader of its part of ``config.json``, which gives weights a format."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jmoe.checkpoint.quantised.formats import Format
from jmoe.checkpoint.quantised.methods.patterns import nearest


@dataclass(frozen=True)
class Rule:
    """One entry of a list of modules.

    matches: whether the rule is about the module of that name.
    format: format of the module's weight; None leaves it plain.
    text: the entry as the file spells it.
    """

    matches: Callable[[str], bool]
    format: Format | None
    text: str


@dataclass(frozen=True)
class Method:
    """One value of the key ``quant_method`` of ``config.json``.

    name: the value.
    rules: function of the method's part of the file that returns its rules, of which the first that matches
        a module decides. It raises ValueError naming the key that is absent or not supported.
    twin: second file that may hold this part.
    """

    name: str
    rules: Callable[[Mapping[str, Any]], Iterable[Rule]]
    twin: "Twin | None" = None


@dataclass(frozen=True)
class Twin:
    """A file that says the same as a method's part of ``config.json``, or that is there in its place.

    file: its name.
    key: key of the file whose value is the configuration.
    rewritten: function of that value that returns it as ``config.json`` would have it.
    check: function of the part of ``config.json`` and of the rewritten value that raises ValueError if they
        contradict each other.
    """

    file: str
    key: str
    rewritten: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    check: Callable[[Mapping[str, Any], Mapping[str, Any]], None]


def listed(key: str, formats: Mapping[str, Format | None]) -> Iterator[Rule]:
    """Yields the rules of an object whose keys are names of modules: a module has the format of its own name,
    or else of the nearest module that it is in.

    key: name of the object in the file.
    """
    find = nearest({name: (stored,) for name, stored in formats.items()})

    def has(stored: Format | None) -> Callable[[str], bool]:
        return lambda module: find(module) == (stored,)

    for stored in dict.fromkeys(formats.values()):
        yield Rule(has(stored), stored, key)
