"""Separates the text of an answer from the thoughts before it, if a model writes both in channels (harmony).

An answer of gpt-oss is several messages; the channel "final" holds the text for the reader:
``<|channel|>analysis<|message|>thoughts<|end|><|start|>assistant<|channel|>final<|message|>text<|return|>``.
A message to a function is a call: ``<|channel|>commentary to=functions.NAME<|message|>ARGUMENTS<|call|>``.
"""

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from jmoe.engine.text.markup import HARMONY_ARGUMENTS, HARMONY_CALL
from jmoe.engine.text.token_bytes import TokenBytes

FINAL = "final"
TO = "to="
FUNCTIONS = "functions."


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

    has_calls: whether a message to a function is a part of the text, between the marks of a call; if not, it
        is thoughts.
    is_final: whether the next tokens are text for the reader.
    is_call: whether they are the arguments of a call.
    header: text so far of a message's header, which is neither answer nor thoughts; None outside of a header.
    role: the header's text before its channel.
    """

    def __init__(self, marks: Marks, token_bytes: TokenBytes, prompt: Sequence[int], *, has_calls: bool):
        self.marks, self.token_bytes, self.has_calls = marks, token_bytes, has_calls
        # An answer that may call follows a grammar, by which it begins within a message's header.
        self.is_final, self.role, self.header = True, "", "" if has_calls else None
        self.is_call = False
        for id in self._open_message(prompt):
            self.take(id)

    def _open_message(self, prompt: Sequence[int]) -> Sequence[int]:
        """Returns the header of the message within which ``prompt`` ends; it is empty if the prompt ends
        outside of a message."""
        backwards = (at for at in reversed(range(len(prompt))) if prompt[at] in self.marks)
        last, before = [*islice(backwards, 2), -1, -1][:2]
        return prompt[before : last + 1] if before >= 0 and prompt[last] == self.marks.message else ()

    def take(self, id: int) -> str:
        """Follows one token. Returns the text that it adds as a mark: the beginning of a call, or ""."""
        self.is_call = self.is_call and id not in self.marks
        if id in (self.marks.start, self.marks.channel):
            self.is_final = id == self.marks.start
            self.role, self.header = "" if self.is_final else self.header or "", ""
        elif id == self.marks.message:
            role, header, self.header = self.role, self.header or "", None
            if self.has_calls and (name := _function(f"{role} {header}")):
                self.is_final = self.is_call = True
                return f"{HARMONY_CALL}{name}{HARMONY_ARGUMENTS}"
            self.is_final = self.is_final or header.split()[:1] == [FINAL]
        elif id == self.marks.end:
            self.header, self.is_final = None, True
        elif self.header is not None:
            is_special = id in self.token_bytes.special_ids
            self.header += " " if is_special else self.token_bytes(id).decode(errors="replace")
        return ""


def _function(header: str) -> str:
    """Returns the name of the function that the message is for, or ""."""
    to = next((word for word in header.split() if word.startswith(TO + FUNCTIONS)), "")
    return to.removeprefix(TO + FUNCTIONS)
