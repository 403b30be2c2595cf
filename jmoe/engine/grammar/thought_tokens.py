"""The places of an answer around its thoughts, and the tokens that lead from one to the next.

The text of a token is a string with one character for each of its bytes, or the token's mark: marks are
beyond U+00FF, so that no other token's bytes are taken for one.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np

from jmoe.engine.text.markup import Markup
from jmoe.engine.text.token_bytes import TokenBytes

WHITE = " \n\r\t"
MAX_WHITE = 16  # characters of white space that may follow the thoughts
MAX_ENDS = 2  # closing markers: the thoughts' own, and one that a model repeats


class Place(NamedTuple):
    """A place in an answer before its grammar begins.

    kind: "start" before thoughts, "thoughts" inside of them, "gap" after them.
    num_matched: number of the marker's characters that end the text so far.
    num_white: number of characters of white space in the gap.
    num_ends: number of closing markers so far.
    """

    kind: Literal["start", "thoughts", "gap"]
    num_matched: int = 0
    num_white: int = 0
    num_ends: int = 0

    @property
    def is_border(self) -> bool:
        """Whether the answer's own text may begin here."""
        return self.kind != "thoughts" and not self.num_matched


class ThoughtTokens:
    """The tokens of one vocabulary beside the markers of thoughts. Making it takes about a second for a large
    vocabulary. Its methods are for one thread.

    markup: markup that has texts around thoughts; whether the answer begins inside of them has no effect.
    """

    def __init__(self, token_bytes: TokenBytes, vocab_size: int, markup: Markup):
        self.token_bytes, self.vocab_size, self.marks = token_bytes, vocab_size, markup.marks
        characters = frozenset(markup.marks.values())
        self.start = _units(markup.thought_start, characters)
        self.end = _units(markup.thought_end, characters)
        if not self.start or not self.end:
            raise ValueError("thoughts need a text that opens them and one that closes them")
        self._borders = _borders(self.end)
        texts = [self._text(id) for id in range(vocab_size)]
        self._outside_ids = [id for id, text in enumerate(texts) if self._may_be_outside(text)]
        self._closing_ids = [id for id, text in enumerate(texts) if self._may_close(text)]
        self._masks: dict[Place, np.ndarray] = {}

    def _text(self, id: int) -> str:
        if id in self.marks:
            return self.marks[id]
        return "" if id in self.token_bytes.special_ids else self.token_bytes(id).decode("latin-1")

    def _may_be_outside(self, text: str) -> bool:
        """Returns whether the token can be white space or a part of a marker, with white space around it or
        thoughts after it."""
        text = text.lstrip(WHITE)
        if not text or text[0] not in self.start + self.end:
            return not text
        rests = (marker[at:] for marker in (self.start, self.end) for at in range(len(marker)))
        return any(rest.startswith(text) or text.startswith(rest) for rest in rests)

    def _may_close(self, text: str) -> bool:
        """Returns whether the token can complete the closing marker and go on."""
        if self.end[-1] not in text:
            return False
        return self.end in text or any(text.startswith(self.end[at:]) for at in range(1, len(self.end)))

    def follow(self, place: Place, token_id: int) -> Place | None:
        """Returns the place after a token, or None if the token does not belong to what surrounds the
        answer's own text."""
        text, now = self._text(token_id), place
        if not text:
            return place if place.kind == "thoughts" else None
        for character in text:
            after = self._after(now, character)
            if after is None:
                return None
            now = after
        return now

    def _after(self, place: Place, character: str) -> Place | None:
        if place.kind == "thoughts":
            return self._within(place, character)
        marker = self.start if place.kind == "start" else self.end
        if character == marker[place.num_matched] and place.num_ends < MAX_ENDS:
            matched = place.num_matched + 1
            if matched < len(marker):
                return place._replace(num_matched=matched)
            ended = place._replace(num_matched=0, num_ends=place.num_ends + 1)
            return Place("thoughts") if place.kind == "start" else ended
        if place.num_matched or character not in WHITE or place.num_white == MAX_WHITE:
            return None
        return place._replace(num_white=place.num_white + 1)

    def _within(self, place: Place, character: str) -> Place:
        matched = place.num_matched
        while matched and character != self.end[matched]:
            matched = self._borders[matched - 1]
        matched += character == self.end[matched]
        return Place("gap", num_ends=1) if matched == len(self.end) else Place("thoughts", matched)

    def mask(self, place: Place) -> np.ndarray:
        """Returns uint32 ``[ceil(vocabulary / 32)]``: a bit mask of the tokens after which ``follow`` returns
        a place, without white space at the start, which belongs to the answer."""
        if (known := self._masks.get(place)) is None:
            bits = np.full(-(-self.vocab_size // 32) * 32, place.kind == "thoughts")
            for id in self._closing_ids if place.kind == "thoughts" else self._outside_ids:
                bits[id] = self.passes(place, id)
            known = self._masks[place] = np.packbits(bits, bitorder="little").view(np.uint32)
        return known

    def passes(self, place: Place, token_id: int) -> bool:
        """Returns whether the token has its bit in ``mask``."""
        after = self.follow(place, token_id)
        return after is not None and not (after.kind == "start" and after.is_border)


def _units(text: str, marks: Iterable[str]) -> str:
    """Returns a marker in the characters of tokens' texts."""
    return "".join(c if c in marks else c.encode().decode("latin-1") for c in text)


def _borders(text: str) -> list[int]:
    """Returns, for each beginning of ``text``, the length of its longest proper beginning that also ends
    it."""
    borders = [0] * len(text)
    for at in range(1, len(text)):
        length = borders[at - 1]
        while length and text[at] != text[length]:
            length = borders[length - 1]
        borders[at] = length + (text[at] == text[length])
    return borders
