"""The growing text of a request: whole characters only, and stop strings that are found across tokens."""

from collections.abc import Sequence

from jmoe.engine.text.answer_text import AnswerText, Piece
from jmoe.engine.text.codec import TextCodec
from jmoe.engine.text.markup import PLAIN, Markup


class Detokenizer:
    """The growing text of one request; ``push`` returns the part that can no longer change.

    A tail that may still change is held back: part of a character, a suffix that could begin a stop string,
    spaces that a text loses at its end.

    prompt: tokens whose text this continues; the first word keeps its space if any text precedes it. None
        means that all bytes of every token count, as a grammar describes them.
    markup: marks that stand in the text, and the texts around the model's thoughts.
    keeps_stop: whether the text ends with the stop string, or with the text of the token that ends it.
    shows_special: whether special tokens are spelled out, also the end token; then nothing is separated.
    thoughts: thoughts that the last call brought. Stop strings have no effect there.
    is_thought: whether the token of the last call is one of the thoughts.
    """

    def __init__(
        self,
        codec: TextCodec,
        stop: Sequence[str] = (),
        prompt: Sequence[int] | None = None,
        markup: Markup = PLAIN,
        *,
        keeps_stop: bool = False,
        shows_special: bool = False,
    ):
        self.stop, self.keeps_stop = tuple(stop), keeps_stop
        self.text = AnswerText(codec.token_bytes, prompt, markup, shows_special=shows_special)
        self.thoughts, self.is_thought = "", False
        self.num_end_spaces = 0 if prompt is None else codec.token_bytes.pieces.num_end_spaces
        self.pending_text = ""
        self.stop_match: str | None = None
        self._call_start, self._tail = markup.call_start, ""

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """Returns the text released by this token; sets ``stop_match`` if a stop string is complete. Raises
        ValueError if the tokenizer fails.

        may_stop: whether a stop string still counts; if not, everything is released.
        """
        self._take(self.text.push(token_id))
        may_stop = may_stop and not self._has_called()
        found = [(at, s) for s in self.stop if (at := self.pending_text.find(s)) >= 0] if may_stop else []
        if found:
            at, self.stop_match = min(found)
            at += len(self.stop_match) if self.keeps_stop else 0
            text, self.pending_text = self.pending_text[:at], ""
            return text
        stops = self.stop if may_stop else ()
        return self._release(max((_overlap(self.pending_text, s) for s in stops), default=0))

    def push_end(self, token_id: int) -> str:
        """Returns the text released by a token that ends the answer: such a token may be a mark, or its text
        is wanted."""
        self._take(self.text.push(token_id) if self.keeps_stop else self.text.push_end(token_id))
        return self._release(0)

    def flush(self) -> str:
        """Returns all text that is still held. It is called after the last token."""
        self._take(self.text.flush())
        text = self._release(0)
        self.pending_text = ""
        return text

    def _has_called(self) -> bool:
        """Returns whether a call has begun before any stop string, which then has no effect any more."""
        start = self._call_start
        if not start or not self.stop:
            return False
        known = self._tail + self.pending_text
        at = known.find(start)
        if at < 0 or any(0 <= known.find(s, len(self._tail)) < at for s in self.stop):
            return False
        self.stop = ()
        return True

    def _take(self, piece: Piece) -> None:
        self.pending_text += piece.text
        self.thoughts, self.is_thought = piece.thoughts, piece.is_thought

    def _release(self, num_pending: int) -> str:
        spaces = len(self.pending_text) - len(self.pending_text.rstrip(" "))
        num_pending = max(num_pending, min(spaces, self.num_end_spaces))
        end = len(self.pending_text) - num_pending
        text, self.pending_text = self.pending_text[:end], self.pending_text[end:]
        self._tail = (self._tail + text)[-len(self._call_start) :] if self._call_start else ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
