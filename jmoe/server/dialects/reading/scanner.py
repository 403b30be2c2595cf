"""Text that comes in pieces, with the steps of a reader that waits for more of it.

A step is a generator: it yields while it needs more text, and returns its result. What a step has taken is
never looked at again, so reading is linear in the length of the text.
"""

import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
Waiting = Generator[None, None, T]
Give = Callable[[str], None]

SPACES = " \t\r\n"
MAX_SPACES = 16  # of white space at one place in a marker
GAP = rf"[ \t\r\n]{{0,{MAX_SPACES}}}"
PART = re.compile(r"[\[\]{},:\ue000-\uf8ff]|[^\s\[\]{},:\ue000-\uf8ff]+")


class Marker:
    """A fixed text of a format. White space around it, and between its words and JSON's punctuation, is free.

    is_exact: whether white space within it, and before it, is as it is written.
    """

    def __init__(self, text: str, *, is_exact: bool = False):
        self.text = text
        self.parts = [text.rstrip()] if is_exact else PART.findall(text)

    @property
    def pattern(self) -> str:
        """The same texts as a regular expression of llguidance."""
        return GAP.join(map(literal_pattern, self.parts))

    def match(self, text: str, at: int) -> int | None:
        """Returns the marker's end in ``text`` if it stands at ``at``, -1 if it does not, and None if the
        text ends before that is known."""
        for i, part in enumerate(self.parts):
            at = skip_spaces(text, at) if i else at
            if not text.startswith(part, at):
                is_open = len(text) - at < len(part) and part.startswith(text[at:])
                return None if is_open else -1
            at += len(part)
        return at

    def find(self, text: str, at: int) -> tuple[int, int | None] | None:
        """Returns the begin and end of the first match from ``at`` on; the end is None if it is not known
        yet. Returns None if there is no match."""
        first = self.parts[0][0]
        while (at := text.find(first, at)) >= 0:
            if (end := self.match(text, at)) != -1:
                return at, end
            at += 1
        return None


def literal_pattern(text: str) -> str:
    return "".join(c if c == "_" or (c.isascii() and c.isalnum()) else f"\\x{{{ord(c):x}}}" for c in text)


def skip_spaces(text: str, at: int) -> int:
    """Returns the index after the white space at ``at``, of which a marker holds no more than a bound."""
    last = min(len(text), at + MAX_SPACES)
    while at < last and text[at] in SPACES:
        at += 1
    return at


class Scanner:
    """The text of one answer.

    text, at: text that is known, and the index up to which it is taken.
    is_closed: whether no more text comes.
    """

    def __init__(self) -> None:
        self.text, self.at, self.is_closed = "", 0, False

    def feed(self, text: str) -> None:
        self.text, self.at = self.text[self.at :] + text, 0

    @property
    def is_done(self) -> bool:
        return self.is_closed and self.at == len(self.text)

    def take(self, end: int, give: Give) -> None:
        """Gives the text up to ``end``."""
        if end > self.at:
            give(self.text[self.at : end])
            self.at = end

    def take_spaces(self, give: Give) -> Waiting[None]:
        """Gives white space up to other text or the end."""
        while True:
            end = self.at
            while end < len(self.text) and self.text[end] in SPACES:
                end += 1
            self.take(end, give)
            if end < len(self.text) or self.is_closed:
                return
            yield

    def take_until(
        self, markers: Sequence[Marker], give: Give, *, drops_cut: bool = False
    ) -> Waiting[Marker | None]:
        """Gives the text up to the first of the markers and returns it, not taken; gives all the rest and
        returns None if none comes. Only what may begin a marker is held back.

        drops_cut: whether what may begin a marker is dropped if the answer ends there.
        """
        while True:
            begin, found = len(self.text), None
            for marker in markers:
                place = marker.find(self.text, self.at)
                if place is not None and place[0] < begin:
                    begin, found = place[0], marker if place[1] is not None else None
            self.take(begin, give)
            if found is not None:
                return found
            if self.is_closed:
                if drops_cut:
                    self.at = len(self.text)
                if begin == len(self.text) or drops_cut:
                    return None
                # What seemed to begin a marker was text; another marker may be in it.
                self.take(begin + 1, give)
                continue
            yield

    def next_of(self, markers: Sequence[Marker]) -> Waiting[Marker | None]:
        """Returns the first of the markers that stands here, which is not taken; None if none does."""
        for marker in markers:
            while (end := marker.match(self.text, self.at)) is None and not self.is_closed:
                yield
            if end is not None and end >= 0:
                return marker
        return None

    def drop_cut(self, markers: Sequence[Marker]) -> Waiting[None]:
        """Drops the rest if the answer ends within one of the markers."""
        for marker in markers:
            while (end := marker.match(self.text, self.at)) is None and not self.is_closed:
                yield
            if end is None:
                self.at = len(self.text)

    def expect(self, marker: Marker) -> Waiting[bool]:
        """Takes the marker and returns whether it stands here. The answer may end within it: then nothing is
        left."""
        yield from self.drop_cut([marker])
        end = marker.match(self.text, self.at)
        if end is None or end < 0:
            return False
        self.at = end
        return True
