"""Pieces of Lark grammars in llguidance's dialect; in their texts private characters stand for tokens."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from jmoe.server.dialects.reading.scanner import Marker, literal_pattern

MARK = re.compile("([\ue000-\uf8ff])")
ANY = r"(.|\n)*"


@dataclass(frozen=True)
class Lark:
    """Writes texts of one tokenizer.

    ids: token id of each private character.
    """

    ids: Mapping[str, int]

    def literal(self, text: str) -> str:
        """Returns what derives exactly ``text``."""
        parts = [part for part in MARK.split(text) if part]
        return " ".join(self._part(part) for part in parts) or '""'

    def _part(self, part: str) -> str:
        return f"<[{self.ids[part]}]>" if part in self.ids else json.dumps(part, ensure_ascii=False)

    def until(self, rule: str, end: str, text: str = ANY) -> str:
        """Returns the line of ``rule``, which derives any text and then ``end``, which is not in the text.

        text: regular expression that the text matches.
        """
        before, *rest = MARK.split(end, maxsplit=1)
        if not rest:
            return f"{rule}[lazy]: /{text}{literal_pattern(end)}/\n"
        ending = f"/{text}{literal_pattern(before)}/ {self.literal(''.join(rest))}"
        return f"{rule}: {ending}\n"

    def until_trigger(self, rule: str, trigger: str) -> str:
        """Returns the line of ``rule``, which derives any text and then ``trigger`` in any of its
        spellings."""
        if MARK.search(trigger):
            return self.until(rule, trigger)
        return f"{rule}[lazy]: /{ANY}{Marker(trigger).pattern}/\n"
