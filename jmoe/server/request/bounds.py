"""Bounds on what one request may hold. docs/api.md has them as a table.

They are checked before the work that they bound, by cheap measures: the body's bytes before it is decoded,
the number of items before they are copied, the length of a text before it is written again.
"""

from typing import Any, TypeVar

import numpy as np

from jmoe.engine.grammar.grammar import MAX_GRAMMAR_BYTES
from jmoe.server.errors import invalid

MAX_JSON_VALUES = 2**20  # in lists and objects, at any depth: token ids are most of them
MAX_JSON_STRINGS = 2**17
MAX_JSON_KEYS = 2**16
MAX_JSON_LISTS = 2**15  # and objects
MAX_MESSAGES = 2**13
MAX_TOKENIZED = 2**21  # characters that /tokenize takes, for any context length
MAX_TOOL_CHARACTERS = 2**20  # characters of all tools, including their descriptions
LIGHT = 16 * 1024  # bytes of a body so small that it needs no checks or limits of its work
COUNTED_BYTES = 64 * 1024  # bytes counted at a time

QUOTE, BACKSLASH = ord('"'), ord("\\")
Item = TypeVar("Item")


def check_json(text: bytes, what: str = "the request body", param: str | None = None) -> None:
    """Raises a 400 if the JSON text holds more than may be decoded at once. The decoder checks whether it is
    JSON.

    The decoder decodes everything in one call, during which no other thread runs, so this function counts
    first.
    """
    if len(text) <= LIGHT:
        return
    values = quotes = keys = lists = 0
    in_string, odd = False, False  # both at the piece's first byte; odd: a backslash escapes it
    for start in range(0, len(text), COUNTED_BYTES):
        bytes_N = np.frombuffer(text, np.uint8, min(COUNTED_BYTES, len(text) - start), start)
        quotes_N, odd = _quotes(bytes_N, odd)
        outside_N = (np.cumsum(quotes_N, dtype=np.int32) & 1) == in_string
        in_string ^= bool(quotes_N.sum() & 1)
        quotes += int(quotes_N.sum())
        values += _count(bytes_N, outside_N, b",")
        keys += _count(bytes_N, outside_N, b":")
        lists += _count(bytes_N, outside_N, b"[{")
        for count, limit, name in (
            (values, MAX_JSON_VALUES, "values"),
            (quotes // 2, MAX_JSON_STRINGS, "strings"),
            (keys, MAX_JSON_KEYS, "keys"),
            (lists, MAX_JSON_LISTS, "lists and objects"),
        ):
            if count > limit:
                code = "invalid_json" if param is None else "invalid_value"
                raise invalid(f"{what} holds more than {limit} {name}", param, code)


def _count(bytes_N: np.ndarray, outside_N: np.ndarray, symbols: bytes) -> int:
    return sum(int(np.count_nonzero((bytes_N == byte) & outside_N)) for byte in symbols)


def _quotes(bytes_N: np.ndarray, odd: bool) -> tuple[np.ndarray, bool]:
    """Returns a mask of the quotes that begin or end a string, and whether the byte after the piece is
    escaped.

    A quote is escaped by an odd number of backslashes before it.
    """
    quotes_N, backslash_N = bytes_N == QUOTE, bytes_N == BACKSLASH
    if not odd and not backslash_N.any():
        return quotes_N, False
    place_N = np.arange(len(bytes_N))
    # Index of the last byte up to here that is no backslash.
    other_N = np.maximum.accumulate(np.where(backslash_N, -1 - odd, place_N))
    before_N = np.concatenate(([-1 - odd], other_N[:-1]))
    escaped_N = (place_N - 1 - before_N) % 2 == 1
    return quotes_N & ~escaped_N, bool((len(bytes_N) - 1 - other_N[-1]) % 2)


def exceeds(value: Any, limit: int) -> bool:
    """Returns whether the JSON text of ``value`` certainly has more than ``limit`` characters.

    It looks at no more of the value than needed. Near the limit, only the text itself can decide.
    """
    left, size = [value], 0
    while left and size <= limit:
        item = left.pop()
        size += 1
        if isinstance(item, str):
            size += len(item)
        elif isinstance(item, dict):
            size += sum(map(len, item))
            left.extend(item.values())
        elif isinstance(item, list):
            left.extend(item)
    return size > limit


def bounded(of_grammar: Item) -> Item:
    """Returns its argument; raises ValueError if a grammar of it is certainly too long. It is called before
    the argument is copied and written."""
    if exceeds(of_grammar, MAX_GRAMMAR_BYTES):
        raise ValueError(f"the grammar is too long; the limit is {MAX_GRAMMAR_BYTES}")
    return of_grammar
