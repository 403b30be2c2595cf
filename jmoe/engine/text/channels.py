"""The text of an answer apart from the thoughts before it, where a model says both in channels (harmony).

An answer of gpt-oss is several messages; the channel "final" holds what the reader asked for:
``<|channel|>analysis<|message|>thoughts<|end|><|start|>assistant<|channel|>final<|message|>text<|return|>``.
"""

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from jmoe.engine.text.token_bytes import GrowingText, TokenBytes

FINAL = "final"


class Marks(NamedTuple):
    """The special tokens between which harmony writes, as ids."""

    start: int
    channel: int
    message: int
    end: int


def harmony_marks(token_bytes: TokenBytes) -> Marks | None:
    """None where the tokenizer does not have all of them as special tokens."""
    found = [token_bytes.tokenizer.token_to_id(f"<|{name}|>") for name in Marks._fields]
    ids = [id for id in found if id is not None and id in token_bytes.special]
    return Marks(*ids) if len(ids) == len(found) else None


class Channels:
    """Follows an answer's tokens. A message without a channel, and words outside of messages, are final.

    final: whether the next words are what the reader asked for.
    header: the words so far of a message's header, None outside of one. They are nobody's text.
    """

    def __init__(self, marks: Marks, token_bytes: TokenBytes, prompt: Sequence[int]):
        self.marks, self.token_bytes = marks, token_bytes
        self.final, self.header = True, None
        for id in self._open_message(prompt):
            self.take(id)

    def _open_message(self, prompt: Sequence[int]) -> Sequence[int]:
        """The header of the message in whose words ``prompt`` ends; empty where it ends in none."""
        backwards = (at for at in reversed(range(len(prompt))) if prompt[at] in self.marks)
        last, before = [*islice(backwards, 2), -1, -1][:2]
        return prompt[before : last + 1] if before >= 0 and prompt[last] == self.marks.message else ()

    def take(self, id: int) -> None:
        if id in (self.marks.start, self.marks.channel):
            self.header, self.final = "", id == self.marks.start
        elif id == self.marks.message:
            self.final = self.final or (self.header or "").split()[:1] == [FINAL]
            self.header = None
        elif id == self.marks.end:
            self.header, self.final = None, True
        elif self.header is not None and id not in self.token_bytes.special:
            self.header += self.token_bytes(id).decode(errors="replace")


class AnswerText:
    """The growing text of an answer and, of a model that tells them apart, of its thoughts.

    prompt: see ``GrowingText``. None = the answer is in no channels either, but as a grammar describes it.
    """

    def __init__(self, token_bytes: TokenBytes, prompt: Sequence[int] | None):
        marks = harmony_marks(token_bytes)
        self.channels = None if marks is None else Channels(marks, token_bytes, prompt or ())
        self.text = GrowingText(token_bytes, prompt)
        self.thoughts = GrowingText(token_bytes)
        self._between = ""  # two messages of thoughts

    def push(self, id: int) -> tuple[str, str]:
        """The characters of the text, and of the thoughts, that the token completes."""
        if self.channels is None:
            return self.text.push(id), ""
        self.channels.take(id)
        if self.channels.header is not None:
            return "", ""
        if self.channels.final:
            return self.text.push(id), ""
        if id != self.channels.marks.message:
            self._between = "\n"
            return "", self.thoughts.push(id)
        return "", self._between

    def flush(self) -> tuple[str, str]:
        """What is left of characters that were not completed."""
        return self.text.flush(), self.thoughts.flush()
