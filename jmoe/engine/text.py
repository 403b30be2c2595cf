"""Text to ids and, incrementally, ids to text: whole characters only, stop strings found across tokens."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer


class TextCodec:
    """A checkpoint's ``tokenizer.json``. Raises ValueError where there is none or it does not fit.

    Encoding adds what the tokenizer's own post-processor adds (a BOS token, for some families).
    """

    def __init__(self, directory: Path, vocab_size: int):
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{directory} has no tokenizer.json; prompts must be token ids")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"cannot read {path}: {error}") from None
        if self.tokenizer.get_vocab_size() > vocab_size:
            raise ValueError(
                f"{path} has {self.tokenizer.get_vocab_size()} tokens, the model's vocabulary {vocab_size}"
            )

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        try:
            return self.tokenizer.encode(text, add_special_tokens=special).ids
        except (TypeError, UnicodeEncodeError):
            raise ValueError("text is not valid Unicode (a lone surrogate)") from None

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def token_text(self, token_id: int) -> str:
        """One token as a caller sees it, special tokens spelled out; bytes of half a character as U+FFFD."""
        return self.tokenizer.decode([token_id], skip_special_tokens=False)


class Detokenizer:
    """The growing text of one request; ``push`` returns what became certain.

    A tail that may still change is held back: half a character (it decodes to U+FFFD), or a suffix that
    could begin a stop string. Only the last few tokens are decoded again.
    """

    def __init__(self, codec: TextCodec, stop: Sequence[str] = ()):
        self.codec, self.stop = codec, tuple(stop)
        self.ids: list[int] = []
        self.prefix = self.read = 0  # ids before ``prefix`` are settled; up to ``read`` were turned to text
        self.held = ""
        self.stopped_by: str | None = None

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """Text released by this token; sets ``stopped_by`` where a stop string is complete.

        ``may_stop`` False releases everything: a stop string in it no longer counts.
        """
        self.ids.append(token_id)
        before = self.codec.decode(self.ids[self.prefix : self.read])
        now = self.codec.decode(self.ids[self.prefix :])
        if len(now) > len(before) and not now.endswith("\ufffd"):
            self.held += now[len(before) :]
            self.prefix, self.read = self.read, len(self.ids)
        if may_stop:
            return self._release()
        text, self.held = self.held, ""
        return text

    def flush(self) -> str:
        """All that is still held, once no more tokens come."""
        before = self.codec.decode(self.ids[self.prefix : self.read])
        text = self.held + self.codec.decode(self.ids[self.prefix :])[len(before) :]
        self.prefix = self.read = len(self.ids)
        self.held = ""
        return text

    def _release(self) -> str:
        found = [(at, s) for s in self.stop if (at := self.held.find(s)) >= 0]
        if found:
            at, self.stopped_by = min(found)
            text, self.held = self.held[:at], ""
            return text
        keep = max((_overlap(self.held, s) for s in self.stop), default=0)
        text, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
