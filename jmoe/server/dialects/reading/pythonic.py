"""Keyword arguments as Python writes them, as a mapping."""

import ast
import re
from collections.abc import Callable
from typing import Any

QUOTED = r'"[^"\\]*(?:\\.[^"\\]*)*"' + "|" + r"'[^'\\]*(?:\\.[^'\\]*)*'"
TOKEN = re.compile(rf"\s*(?:({QUOTED})|([\[\](){{}},:=])|([^\s\[\](){{}},:=\"']+)|$)", re.S)
WORDS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}
INTEGER = re.compile(r"[+-]?[0-9]+")


def keyword_arguments(text: str) -> dict[str, Any]:
    """Returns the arguments in ``text``: ``name=value, ...`` with literals of Python, in which JSON's words
    also stand for their values. A name may be any word. Raises ValueError for other text."""
    return _Parser(text).keywords()


class _Parser:
    def __init__(self, text: str):
        self.text, self.at, self.token = text, 0, ""
        self.step()

    def step(self) -> str:
        """Goes to the next token, which is "" at the end, and returns the one before it."""
        before = self.token
        found = TOKEN.match(self.text, self.at)
        if found is None:
            raise ValueError(f"not a literal at {self.at}")
        self.token, self.at = found[0].lstrip(), found.end()
        return before

    def skip(self, token: str) -> None:
        if self.step() != token:
            raise ValueError(f"{token!r} is missing")

    def keywords(self) -> dict[str, Any]:
        made: dict[str, Any] = {}
        while self.token:
            name = self.step()
            self.skip("=")
            made[name] = self.value()
            if self.token:
                self.skip(",")
        return made

    def value(self) -> Any:
        token = self.step()
        match token[:1]:
            case "[" | "(":
                return self._items("]" if token == "[" else ")", self.value)
            case "{":
                return dict(self._items("}", self._pair))
            case '"' | "'":
                try:
                    return ast.literal_eval(token.replace("\n", "\\n").replace("\r", "\\r"))
                except SyntaxError as error:
                    raise ValueError(str(error)) from None
        if token in WORDS:
            return WORDS[token]
        return int(token) if INTEGER.fullmatch(token) else float(token)

    def _items(self, end: str, item: Callable[[], Any]) -> list[Any]:
        made: list[Any] = []
        while self.token != end:
            made.append(item())
            if self.token != end:
                self.skip(",")
        self.skip(end)
        return made

    def _pair(self) -> tuple[str, Any]:
        key = self.value()
        if not isinstance(key, str):
            raise ValueError("a key that is no text")
        self.skip(":")
        return key, self.value()
