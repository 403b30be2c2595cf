"""What a method's file declares: how its part of ``config.json`` says which weights have which format."""

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
    """One value of ``quant_method``.

    name: the value.
    rules: function of the configuration of the quantisation that returns its rules; the first that matches a
        module decides. It raises ValueError naming the key that is absent or not supported.
    """

    name: str
    rules: Callable[[Mapping[str, Any]], Iterable[Rule]]
