"""The encodings of a call's arguments, each as a step that reads them and gives their JSON text.

A step returns whether the arguments are whole; what it has given of others stays given.
"""

import json
import re
from collections.abc import Mapping

from jmoe.server.dialects.format import Tagged
from jmoe.server.dialects.reading.declared import TYPES, json_of, kind_of
from jmoe.server.dialects.reading.pythonic import keyword_arguments
from jmoe.server.dialects.reading.scanner import SPACES, Give, Marker, Scanner, Waiting

OUTSIDE = re.compile(r'["{}\[\]]')
INSIDE = {quote: re.compile(rf"[{quote}\\\\]") for quote in "\"'"}
PYTHON = re.compile(r"""["'()\[\]{}]""")


class Extent:
    """Finds where nested brackets end that are outside of strings.

    depth: number of brackets that are open.
    quote: quote that ends the string which is open, or "".
    """

    def __init__(self, symbols: re.Pattern[str], depth: int = 0):
        self.symbols, self.depth, self.quote, self.is_escaped = symbols, depth, "", False

    def end(self, text: str, at: int) -> int:
        """Returns the index of the bracket in ``text`` that closes the first one; -1 if it is not there."""
        while at < len(text):
            if self.is_escaped:
                self.is_escaped, at = False, at + 1
                continue
            pattern = INSIDE[self.quote] if self.quote else self.symbols
            if (found := pattern.search(text, at)) is None:
                return -1
            symbol, at = found[0], found.end()
            if self.quote:
                self.is_escaped = symbol == "\\"
                self.quote = "" if symbol == self.quote else self.quote
            elif symbol in "\"'":
                self.quote = symbol
            else:
                self.depth += 1 if symbol in "([{" else -1
                if self.depth == 0:
                    return at - 1
        return -1


def read_json(source: Scanner, give: Give) -> Waiting[bool]:
    """Reads a JSON object, which is given as it comes."""
    yield from source.take_spaces(_drop)
    if source.text[source.at : source.at + 1] != "{":
        return False
    extent = Extent(OUTSIDE)
    while (end := extent.end(source.text, source.at)) < 0:
        source.take(len(source.text), give)
        if source.is_closed:
            return False
        yield
    source.take(end + 1, give)
    return True


def read_pythonic(source: Scanner, give: Give) -> Waiting[bool]:
    """Reads Python's keyword arguments up to the parenthesis that closes them, which is not taken. They are
    given when it comes; arguments that are none of Python's are given as they are."""
    parts: list[str] = []
    extent = Extent(PYTHON, depth=1)
    while (end := extent.end(source.text, source.at)) < 0:
        source.take(len(source.text), parts.append)
        if source.is_closed:
            return False
        yield
    source.take(end, parts.append)
    text = "".join(parts)
    try:
        give(json.dumps(keyword_arguments(text), ensure_ascii=False, allow_nan=False))
    except (ValueError, RecursionError):
        give(text)
    return True


class TaggedArguments:
    """Reads arguments that are written one by one.

    types: declared types by argument; an argument without them is a text unless it is exactly JSON.
    """

    def __init__(self, tags: Tagged, closes: str, types: Mapping[str, frozenset[str]]):
        self.key, self.value, self.closes = Marker(tags.key), Marker(tags.value), Marker(closes)
        self.end = Marker(tags.end, is_exact=True)
        self.margin = tags.value[len(tags.value.rstrip()) :]
        self.types = types

    def read(self, source: Scanner, give: Give) -> Waiting[bool]:
        """Reads them up to what closes the call, which is not taken."""
        opening = "{"
        while True:
            yield from source.take_spaces(_drop)
            found = yield from source.next_of([self.key, self.closes])
            if found is not self.key:
                if found is self.closes:
                    give("{}" if opening == "{" else "}")
                yield from source.drop_cut([self.key, self.closes])
                return found is self.closes
            yield from source.expect(self.key)
            parts: list[str] = []
            if (yield from source.take_until([self.value], parts.append)) is None:
                return False
            yield from source.expect(self.value)
            name = "".join(parts).strip(SPACES)
            give(f"{opening}{json.dumps(name, ensure_ascii=False)}: ")
            opening = ", "
            if not (yield from self._value(source, self.types.get(name, TYPES), give)):
                return False

    def _value(self, source: Scanner, types: frozenset[str], give: Give) -> Waiting[bool]:
        for space in self.margin:
            while source.at == len(source.text) and not source.is_closed:
                yield
            source.at += source.text.startswith(space, source.at)
        if kind_of(types) == "text":

            def give_text(text: str) -> None:
                give(escaped(text))

            give('"')
            found = yield from source.take_until([self.end], give_text, drops_cut=True)
            if found is not None:
                give('"')
        else:
            parts: list[str] = []
            found = yield from source.take_until([self.end], parts.append)
            if found is not None:
                give(json_of("".join(parts), types))
        if found is None:
            return False
        yield from source.expect(self.end)
        return True


def escaped(text: str) -> str:
    """Returns the text as it stands within a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _drop(text: str) -> None:
    """White space that belongs to nobody."""
