"""Text to ids, and ids to text, by a checkpoint's tokenizer."""

import threading
from collections.abc import Sequence
from functools import cached_property

from jmoe.checkpoint.source import ModelFiles, source_of
from jmoe.engine.text.fewest_tokens import FewestTokens
from jmoe.engine.text.token_bytes import TokenBytes
from jmoe.engine.text.tokenizer_files import guarded, load_tokenizer, missing

LONG = 1 << 18  # characters; longer texts are tokenized one at a time: each takes about 100 bytes a character


def load_codec(model: ModelFiles, vocab_size: int) -> "TextCodec | None":
    """Returns the codec, or None if the model has no tokenizer in any format; raises ValueError if it has
    one that cannot be read."""
    source = source_of(model)
    if not source.has_tokenizer() and missing(source.path) is None:
        return None
    return TextCodec(source, vocab_size)


class TextCodec:
    """A checkpoint's tokenizer. Raises ValueError if the checkpoint has none or if it does not fit the model.

    Encoding adds what the tokenizer's own post-processor adds (for some families a BOS token). Encoding and
    decoding both release the interpreter's lock.
    """

    def __init__(self, model: ModelFiles, vocab_size: int):
        self.tokenizer = load_tokenizer(source_of(model), vocab_size)
        self.vocab_size = vocab_size
        self.token_bytes = TokenBytes(self.tokenizer)
        self._long_text_lock = threading.Lock()

    def encode(self, text: str, *, special: bool = True, limit: int | None = None) -> list[int]:
        """Returns the token ids of a text. Raises ValueError for a text that is not valid Unicode or needs an
        id outside the model's vocabulary.

        limit: context length of the model; a text that cannot fit in it is refused before it is tokenized.
        """
        if limit is not None:
            self._check_characters(text, limit)
        if len(text) > LONG:
            with self._long_text_lock:
                ids = self._ids(text, special, limit)
        else:
            ids = self._ids(text, special, limit)
        if max(ids, default=0) >= self.vocab_size:
            beyond = next(id for id in ids if id >= self.vocab_size)
            raise ValueError(
                f"the text has the token {self.token_text(beyond)[:50]!r}, whose id {beyond} is outside the "
                f"model's vocabulary of {self.vocab_size}"
            )
        return ids

    def _ids(self, text: str, special: bool, limit: int | None) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("text is not valid Unicode (a lone surrogate)") from None
        with guarded("encode this text"):
            # ``encode`` would hold the interpreter's lock all the time.
            encoding = self.tokenizer.encode_batch_fast([text], add_special_tokens=special)[0]
        if limit is not None and len(encoding) > limit:
            raise ValueError(too_long(limit, f"your prompt has {len(encoding)} tokens"))
        return encoding.ids

    @cached_property
    def _fewest_tokens(self) -> FewestTokens:
        return FewestTokens(self.tokenizer)

    def _check_characters(self, text: str, limit: int) -> None:
        least = self._fewest_tokens(text, limit) if len(text) > limit else 0
        if least > limit:
            raise ValueError(
                too_long(limit, f"your prompt has {len(text)} characters, which are at least {least} tokens")
            )

    def token_starts(self, text: str, *, special: bool = True) -> list[int]:
        """Returns the index of the character of ``text`` at which each of its tokens begins."""
        with guarded("encode this text"):
            encoding = self.tokenizer.encode_batch([text], add_special_tokens=special)[0]
        starts, at = [], 0
        for begin, end in encoding.offsets:
            starts.append(begin if end > begin else at)
            at = max(at, end)
        return starts

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        with guarded("decode these tokens"):
            return self.tokenizer.decode_batch([list(ids)], skip_special_tokens=skip_special)[0]

    def token_text(self, token_id: int) -> str:
        """Returns one token as text for a caller: special tokens are spelled out, part of a character is
        U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")


def too_long(limit: int, cause: str) -> str:
    return f"This model's maximum context length is {limit} tokens. However, {cause}."
