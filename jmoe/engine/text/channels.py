"""Separates the text of an answer from the thoughts before it, if a model writes both in channels (harmony).

An answer of gpt-oss is several messages; the channel "final" holds the text for the reader:
``<|channel|>analysis<|message|>thoughts<|end|><|start|>assistant<|channel|>final<|message|>text<|return|>``.
"""

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from jmoe.engine.text.token_bytes import GrowingText, TokenBytes

FINAL = "final"


class Marks(NamedTuple):
    """Ids of the special tokens that delimit harmony's messages.

    start: beginning of a message.
    channel: token before the name of the message's channel.
    message: end of the header.
    end: end of the message.
    """

    start: int
    channel: int
    message: int
    end: int


def harmony_marks(token_bytes: TokenBytes) -> Marks | None:
    """Returns the ids of harmony's special tokens, or None if the tokenizer does not have all of them as
    special."""
    found = [token_bytes.tokenizer.token_to_id(f"<|{name}|>") for name in Marks._fields]
    ids = [id for id in found if id is not None and id in token_bytes.special_ids]
    return Marks(*ids) if len(ids) == len(found) else None


class Channels:
    """Follows an answer's tokens. A message without a channel, and text outside of messages, are final.

    is_final: whether the next tokens are text for the reader.
    header: text so far of a message's header, which is neither answer nor thoughts; None outside of a header.
    """

    def __init__(self, marks: Marks, token_bytes: TokenBytes, prompt: Sequence[int]):
        self.marks, self.token_bytes = marks, token_bytes
        self.is_final, self.header = True, None
        for id in self._open_message(prompt):
            self.take(id)

    def _open_message(self, prompt: Sequence[int]) -> Sequence[int]:
        """Returns the header of the message within which ``prompt`` ends; it is empty if the prompt ends
        outside of a message."""
        backwards = (at for at in reversed(range(len(prompt))) if prompt[at] in self.marks)
        last, before = [*islice(backwards, 2), -1, -1][:2]
        return prompt[before : last + 1] if before >= 0 and prompt[last] == self.marks.message else ()

    def take(self, id: int) -> None:
        if id in (self.marks.start, self.marks.channel):
            self.header, self.is_final = "", id == self.marks.start
        elif id == self.marks.message:
            self.is_final = self.is_final or (self.header or "").split()[:1] == [FINAL]
            self.header = None
        elif id == self.marks.end:
            self.header, self.is_final = None, True
        elif self.header is not None and id not in self.token_bytes.special_ids:
            self.header += self.token_bytes(id).decode(errors="replace")


class AnswerText:
    """The growing text of an answer and, if the model separates them, of its thoughts.

    prompt: see ``GrowingText``. None also means that no channel is open at the start, as under a grammar.
    shows_special: whether special tokens are spelled out, so that nothing is separated.
    """

    def __init__(self, token_bytes: TokenBytes, prompt: Sequence[int] | None, *, shows_special: bool = False):
        marks = None if shows_special else harmony_marks(token_bytes)
        self.channels = None if marks is None else Channels(marks, token_bytes, prompt or ())
        self.text = GrowingText(token_bytes, prompt, shows_special=shows_special)
        self.thoughts = GrowingText(token_bytes)
        self._separator = ""  # separates two messages of thoughts

    def push(self, id: int) -> tuple[str, str]:
        """Returns the characters of the text, and of the thoughts, that the token completes."""
        if self.channels is None:
            return self.text.push(id), ""
        self.channels.take(id)
        if self.channels.header is not None:
            return "", ""
        if self.channels.is_final:
            return self.text.push(id), ""
        if id != self.channels.marks.message:
            self._separator = "\n"
            return "", self.thoughts.push(id)
        return "", self._separator

    def flush(self) -> tuple[str, str]:
        """Returns what is left of incomplete characters: of the text, and of the thoughts."""
        return self.text.flush(), self.thoughts.flush()
