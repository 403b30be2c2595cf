"""Bounds on what a chat template computes: its time, and the size of each value before it is made."""

import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import permutations
from typing import Any

import jinja2

MAX_SIZE = 8 * 1024 * 1024  # characters of a text; the body's limit
MAX_WRITTEN = 8 * MAX_SIZE  # characters of one rendering; those of blocks and macros count at each level
MAX_BITS = 1 << 16  # bits of an integer
PART = 32  # characters that each part of a value counts as, because visiting parts takes longer
# A width or precision of five digits or more, or one that an argument sets.
WIDTHS = {
    "%": re.compile(r"%(?:\([^)]*\))?[-+ #0]*(?:\d{5}|\*|\d*\.(?:\d{5}|\*))"),
    "{": re.compile(r"\{[^{}]*:[^{}]*(?:\d{5}|\{)"),
}


class TooLong(jinja2.TemplateRuntimeError):
    """Raised when the time for one rendering is over."""


class TooLarge(jinja2.TemplateRuntimeError):
    """Raised when a value would exceed the limit."""

    def __init__(self) -> None:
        super().__init__(f"it makes a value of more than {MAX_SIZE} characters")


class Bounds:
    """Bounds of renderings. Each thread has its own clock, which measures the thread's processor time."""

    def __init__(self) -> None:
        self._local = threading.local()

    def start(self, seconds: float) -> None:
        self._local.seconds, self._local.left = seconds, MAX_WRITTEN
        self._local.end = time.thread_time() + seconds

    def check_clock(self) -> None:
        """Raises TooLong once this thread has used more processor time than ``start`` allowed."""
        if time.thread_time() > self._local.end:
            raise TooLong(f"it takes longer than {self._local.seconds:g} s")

    def in_time(self, values: Iterable[Any] | None) -> Iterator[Any]:
        """Yields the values and checks the clock at each. A None counts as empty: templates loop over tools
        that a request does not have."""
        for value in () if values is None else values:
            self.check_clock()
            yield value

    def listed(self, value: Any) -> Any:
        return list(self.in_time(value)) if isinstance(value, Iterator) else value

    def write(self, value: Any) -> str:
        text = value if isinstance(value, str) else str(self.measured(value))
        self._local.left -= len(text)
        if self._local.left < 0:
            raise TooLarge
        return text

    def measured(self, value: Any) -> Any:
        """Returns the value; raises TooLarge if its text would exceed the limit. Shared parts count each
        time."""
        if value is None or isinstance(value, int | float):
            return value
        left, todo, visited = MAX_SIZE, [value], 0
        while todo:
            each, visited = todo.pop(), visited + 1
            left -= PART + (len(each) if isinstance(each, str | bytes) else 0)
            if left < 0:
                raise TooLarge
            if isinstance(each, Mapping):
                todo += [*each.keys(), *each.values()]
            elif isinstance(each, list | tuple | set | frozenset):
                todo += each
            if visited % 1024 == 0:
                self.check_clock()
        return value

    def check_call(self, name: str, value: Any, args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
        """Raises TooLarge for a filter or method ``name`` of ``value`` that would make too much."""
        arguments = [*args, *kwargs.values()]
        numbers = [number for number in arguments if isinstance(number, int)]
        texts = [text for text in arguments if isinstance(text, str | bytes)]
        check_size(max(numbers, default=0) * (64 if name == "slice" else 1))
        if name == "translate" or (name in ("pprint", "urlize") and len(str(value)) > 1 << 16):
            raise TooLarge
        if name == "replace":
            for old, new in permutations(texts, 2):
                check_size(length(value) + str(value).count(str(old)) * len(new))
        elif name == "expandtabs":
            check_size(len(value) + str(value).count("\t") * max(numbers, default=8))
        elif name in ("join", "indent", "wordwrap"):
            self._check_repeated(name, value, arguments)
        elif name in ("format", "format_map") and isinstance(value, str):
            parts = [part for each in arguments for part in flat(each)]
            for style in WIDTHS:  # the filter takes the first, the method the second
                self.check_format(style, value, parts)

    def _check_repeated(self, name: str, value: Any, arguments: list[Any]) -> None:
        """Checks calls that write a text, or a number of spaces, between parts or lines."""
        if name == "join" and isinstance(value, str | bytes) and arguments:  # the method: "-".join(values)
            value, arguments = arguments[0], [value]
        lines = str(value).count("\n") + 1 if name == "indent" else length(value)
        check_size(lines * max((n if isinstance(n, int) else length(n) for n in arguments), default=0))
        self.measured(value)

    def check_format(self, style: str, form: str | bytes, arguments: list[Any]) -> None:
        text = form if isinstance(form, str) else form.decode("latin-1")
        if WIDTHS[style].search(text):
            raise TooLarge
        longest = max((len(str(self.measured(value))) for value in arguments), default=0)
        check_size(len(text) + text.count(style) * longest)


def length(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple | set | dict) else 1


def check_size(size: int) -> None:
    if size > MAX_SIZE:
        raise TooLarge


def small(value: Any) -> Any:
    check_size(length(value))
    return value


def flat(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else [value]


def check_number(operator: str, left: Any, right: Any) -> None:
    """Checks a product or power: the bits of an integer, or the size of a repeated text or list."""
    for value, times in ((left, right), (right, left)):
        if operator == "*" and isinstance(value, str | bytes | list | tuple) and isinstance(times, int):
            check_size(len(value) * times)
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MAX_BITS:
            raise TooLarge
