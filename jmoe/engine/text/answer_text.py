"""The growing text of an answer, and of the thoughts that its model writes apart from it."""

from collections.abc import Sequence
from typing import NamedTuple

from jmoe.engine.text.channels import Channels, harmony_marks
from jmoe.engine.text.markup import PLAIN, Markup
from jmoe.engine.text.thoughts import Thoughts
from jmoe.engine.text.token_bytes import GrowingText, TokenBytes


class Piece(NamedTuple):
    """The characters that one token completes.

    text: characters of the text.
    thoughts: characters of the thoughts.
    is_thought: whether the token is one of the thoughts.
    """

    text: str
    thoughts: str = ""
    is_thought: bool = False


class AnswerText:
    """The growing text of an answer and, if the model separates them, of its thoughts.

    prompt: see ``GrowingText``. None also means that no channel is open at the start, as under a grammar.
    markup: marks that stand in the text, and the texts around thoughts.
    shows_special: whether special tokens are spelled out; then nothing is separated, and there are no marks.
    """

    def __init__(
        self,
        token_bytes: TokenBytes,
        prompt: Sequence[int] | None,
        markup: Markup = PLAIN,
        *,
        shows_special: bool = False,
    ):
        markup = PLAIN if shows_special else markup
        self.marks, self.channels = markup.marks, None
        self.shown_ids = token_bytes.special_ids if shows_special else frozenset(self.marks)
        if (marks := None if shows_special else harmony_marks(token_bytes)) is not None:
            has_calls = markup.has_harmony_calls
            self.channels = Channels(marks, token_bytes, prompt or (), has_calls=has_calls)
        self.around = Thoughts(markup) if markup.thought_start and marks is None else None
        self.text = GrowingText(token_bytes, prompt, shows_special=shows_special, markup=markup)
        self.thoughts = GrowingText(token_bytes)
        self._separator = ""  # separates two messages of thoughts

    def push(self, id: int) -> Piece:
        """Returns what the token completes."""
        if self.channels is not None:
            return self._in_channels(self.channels, id)
        text = self.text.push(id)
        if self.around is None:
            return Piece(text)
        was_inside = self.around.is_inside
        return Piece(*self.around.feed(text), is_thought=was_inside and self.around.is_inside)

    def push_end(self, id: int) -> Piece:
        """Returns what a token that ends the answer completes: only marks, or special tokens that are spelled
        out, are a part of the text."""
        return self.push(id) if id in self.shown_ids else Piece("")

    def flush(self) -> Piece:
        """Returns what is left, of incomplete characters and of what could still have been a marker."""
        if self.around is None:
            return Piece(self.text.flush(), self.thoughts.flush())
        (text, thoughts), (more, rest) = self.around.feed(self.text.flush()), self.around.flush()
        return Piece(text + more, thoughts + rest)

    def _in_channels(self, channels: Channels, id: int) -> Piece:
        was_call = channels.is_call
        if mark := channels.take(id):
            return Piece(mark)
        if id in self.marks:
            return Piece(self.text.push(id) if was_call else "")
        if channels.header is not None:
            return Piece("")
        if channels.is_final:
            return Piece(self.text.push(id))
        if id != channels.marks.message:
            self._separator = "\n"
            return Piece("", self.thoughts.push(id), is_thought=True)
        return Piece("", self._separator)
