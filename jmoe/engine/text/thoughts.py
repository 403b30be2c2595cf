"""Separates the text of an answer from the thoughts before it, if a model writes texts around these.

The answer opens its thoughts itself, or the prompt has opened them. White space around thoughts belongs to
nobody. Thoughts that are not closed last until the answer's end.
"""

from enum import Enum

from jmoe.engine.text.markup import Markup


class Place(Enum):
    """The place that an answer has reached.

    START: nothing but white space so far.
    THOUGHTS: inside of thoughts.
    AFTER: nothing but white space since the end of thoughts.
    TEXT: inside of the text, which lasts until the answer's end.
    """

    START = "start"
    THOUGHTS = "thoughts"
    AFTER = "after"
    TEXT = "text"


class Thoughts:
    """Follows the text of one answer. However it is cut into pieces, the joined results are the same.

    markup: markup whose ``thought_start`` and ``thought_end`` are not empty.
    """

    def __init__(self, markup: Markup):
        self.start, self.end = markup.thought_start, markup.thought_end
        self.place = Place.THOUGHTS if markup.in_thought else Place.START
        self._pending, self._is_bare = "", True  # bare: the thoughts have nothing but white space so far

    @property
    def is_inside(self) -> bool:
        return self.place is Place.THOUGHTS

    def feed(self, more: str) -> tuple[str, str]:
        """Returns the text, and the thoughts, that become certain."""
        self._pending += more
        thoughts = ""
        while self.place is not Place.TEXT:
            if self.place is not Place.THOUGHTS:
                if not self._leave_gap():
                    return "", thoughts
                continue
            before, found, rest = self._pending.partition(self.end)
            if not found:
                return "", thoughts + self._certain_thoughts()
            thoughts += self._trimmed(before.rstrip())
            self.place, self._pending = Place.AFTER, rest
        text, self._pending = self._pending, ""
        return text, thoughts

    def flush(self) -> tuple[str, str]:
        """Returns what is held, at the answer's end."""
        held, self._pending = self._pending, ""
        if self.place is Place.THOUGHTS:
            return "", self._trimmed(held)
        return held if self.place is Place.START else held.lstrip(), ""

    def _leave_gap(self) -> bool:
        """Passes white space, and markers. Returns False if more text must decide where the answer goes
        on."""
        text = self._pending.lstrip()
        markers = {self.start: Place.THOUGHTS, self.end: Place.AFTER}
        for marker, place in markers.items():
            if text.startswith(marker):
                self.place, self._pending, self._is_bare = place, text[len(marker) :], True
                return True
            if marker.startswith(text):  # also if there is no text yet
                return False
        self._pending = self._pending if self.place is Place.START else text
        self.place = Place.TEXT
        return True

    def _certain_thoughts(self) -> str:
        """Takes the thoughts that cannot be a part of the closing marker, nor white space before it."""
        pending = self._pending
        held = next((n for n in range(len(self.end) - 1, 0, -1) if pending.endswith(self.end[:n])), 0)
        certain = pending[: len(pending) - held].rstrip()
        self._pending = pending[len(certain) :]
        return self._trimmed(certain)

    def _trimmed(self, thoughts: str) -> str:
        """Returns the thoughts without the white space at their beginning."""
        if self._is_bare:
            thoughts = thoughts.lstrip()
            self._is_bare = not thoughts
        return thoughts
