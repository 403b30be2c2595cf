"""The declaration of a method: the reader of its part of ``config.json``, which gives weights a format."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jmoe.checkpoint.formats import Format


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
    """

    name: str
    rules: Callable[[Mapping[str, Any]], Iterable[Rule]]
