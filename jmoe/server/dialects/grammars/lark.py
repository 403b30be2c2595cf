"""Pieces of Lark grammars in llguidance's dialect; in their texts private characters stand for tokens."""

import json
import re
from collections.abc import Mapping

from jmoe.server.dialects.reading.scanner import Marker, literal_pattern

MARK = re.compile("([\ue000-\uf8ff])")
ANY = r"(.|\n)*"


class Lark:
    """Writes a grammar over one tokenizer.

    ids: token id of each private character.
    rules: name of each rule that was written, by what it derives: equal rules are one.
    """

    def __init__(self, ids: Mapping[str, int]):
        self.ids, self.rules = ids, dict[str, str]()

    def rule(self, body: str, attribute: str = "") -> str:
        """Returns the name of a rule that derives ``body``."""
        return self.rules.setdefault(f"{attribute}: {body}", f"r{len(self.rules)}")

    def terminal(self, body: str) -> str:
        """Returns the name of a terminal that matches ``body``."""
        return self.rules.setdefault(f": {body}", f"R{len(self.rules)}")

    @property
    def lines(self) -> str:
        """The lines of all rules and terminals."""
        return "".join(f"{name}{body}\n" for body, name in self.rules.items())

    def literal(self, text: str) -> str:
        """Returns what derives exactly ``text``."""
        parts = [part for part in MARK.split(text) if part]
        return " ".join(self._part(part) for part in parts) or '""'

    def _part(self, part: str) -> str:
        return f"<[{self.ids[part]}]>" if part in self.ids else json.dumps(part, ensure_ascii=False)

    def until(self, end: str, text: str | None = None) -> str:
        """Returns what derives any text and then ``end``, which is not in the text.

        text: terminal that the text matches; it does not match ``end``.
        """
        before, *rest = MARK.split(end, maxsplit=1)
        if text is not None:
            if not rest:
                return self.rule(f"{text} {self.literal(end)}", "[lazy]")
            first = self.terminal(f"{text} {self.literal(before)}") if before else text
            return f"{first} {self.literal(''.join(rest))}"
        if not rest:
            return self.rule(f"/{ANY}{literal_pattern(end)}/", "[lazy]")
        return f"{self.terminal(f'/{ANY}{literal_pattern(before)}/')} {self.literal(''.join(rest))}"

    def until_trigger(self, trigger: str) -> str:
        """Returns what derives any text and then ``trigger`` in any of its spellings."""
        if MARK.search(trigger):
            return self.until(trigger)
        return self.rule(f"/{ANY}{Marker(trigger).pattern}/", "[lazy]")

    def without(self, trigger: str) -> str:
        """Returns what keeps a terminal of any text from having ``trigger`` in it."""
        return "" if MARK.search(trigger) else f" & ~/{ANY}{Marker(trigger).pattern}{ANY}/"
