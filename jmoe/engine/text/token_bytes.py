"""The bytes of each token, and text that grows token by token.

A decoder of the tokenizers library decodes a whole sequence: its first piece loses its space, parts of a
character become U+FFFD. Text that continues a prompt, the names of single tokens and their positions in a
text need the bytes that one token adds, which are the same wherever the token stands.
"""

import codecs
import json
import re
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from jmoe.engine.text.markup import PLAIN, Markup
from jmoe.engine.text.tokenizer_files import guarded

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """Returns the letters with which byte-level tokens spell bytes: printable bytes as themselves, others
    from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


ALPHABET = _byte_alphabet()


class Pieces:
    """The rules by which a decoder turns single tokens into bytes.

    is_known: whether the tokenizer has a decoder all of whose parts are understood here.
    num_start_spaces: number of spaces that the beginning of a text loses.
    num_end_spaces: number of spaces that the end of a text loses.
    is_start_bare: whether the first token loses all its spaces instead.
    """

    def __init__(self, decoder: dict[str, Any] | None):
        self.is_known, self.is_start_bare = decoder is not None, False
        self.num_start_spaces = self.num_end_spaces = 0
        self._is_byte_level = self._has_byte_fallback = False
        self._replacements: list[tuple[str, str]] = []
        for part in _flat(decoder or {}):
            self._add_part(part)

    def _add_part(self, part: dict[str, Any]) -> None:
        kind, pattern = part.get("type"), part.get("pattern")
        if kind == "ByteLevel":
            self._is_byte_level = True
        elif kind == "ByteFallback":
            self._has_byte_fallback = True
        elif kind == "Replace" and isinstance(pattern, dict) and "String" in pattern:
            self._replacements.append((pattern["String"], part["content"]))
        elif kind == "Metaspace":
            self._replacements.append((part["replacement"], " "))
            self.is_start_bare = part.get("prepend_scheme", "always") != "never"
        elif kind == "Strip" and part.get("content") == " ":
            self.num_start_spaces += part["start"]
            self.num_end_spaces += part["stop"]
        elif kind != "Fuse":
            self.is_known = False

    def bytes_of(self, token: str) -> bytes:
        if self._is_byte_level:
            try:
                return bytes(map(ALPHABET.__getitem__, token))
            except KeyError:  # an added token is spelled as plain text
                return token.encode()
        for old, new in self._replacements:
            token = token.replace(old, new)
        found = BYTE_PIECE.fullmatch(token) if self._has_byte_fallback else None
        return bytes([int(found[1], 16)]) if found else token.encode()


def _flat(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder.get("type") == "Sequence":
        return [part for each in decoder["decoders"] for part in _flat(each)]
    return [decoder]


class TokenBytes:
    """The bytes that each token of a tokenizer adds to a text. An id without a token adds nothing."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        with guarded("tell its decoder"):
            decoder = tokenizer.decoder
            self.pieces = Pieces(None if decoder is None else json.loads(decoder.__getstate__()))
            added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self._cache: dict[int, bytes] = {}
        self._anchor: tuple[int, str] | None = None

    def __call__(self, id: int) -> bytes:
        """Returns the bytes of a token. Raises ValueError if the library fails on the token."""
        if (known := self._cache.get(id)) is None:
            known = self._cache[id] = self._bytes(id)
        return known

    def _bytes(self, id: int) -> bytes:
        with guarded("decode a token"):
            token = self.tokenizer.id_to_token(id)
            if token is None:
                return b""
            return self.pieces.bytes_of(token) if self.pieces.is_known else self._difference(id)

    def _difference(self, id: int) -> bytes:
        """Returns the bytes that the token adds after a word, for decoders that are not known."""
        if self._anchor is None:
            words = (i for i in self.tokenizer.get_vocab().values() if i not in self.special_ids)
            word = next((i for i in words if self.tokenizer.decode([i]).isalnum()), -1)
            self._anchor = word, "" if word < 0 else self.tokenizer.decode([word])
        word, text = self._anchor
        both = self.tokenizer.decode([id] if word < 0 else [word, id], skip_special_tokens=False)
        return both.removeprefix(text).encode()

    def first(self, id: int) -> bytes:
        """Returns the bytes of a token that is the first of a text."""
        if self.pieces.is_known:
            return self(id).replace(b" ", b"") if self.pieces.is_start_bare else self(id)
        with guarded("decode a token"):
            return self.tokenizer.decode([id], skip_special_tokens=False).encode()


class GrowingText:
    """Text that grows token by token, in whole characters; a broken character becomes U+FFFD.

    context: tokens that the text continues; None means unknown text, so that all bytes of every token count.
    shows_special: whether special tokens are spelled out.
    markup: marks that stand in the text for tokens; the other tokens never add such a character.
    """

    def __init__(
        self,
        token_bytes: TokenBytes,
        context: Sequence[int] | None = None,
        *,
        shows_special: bool = False,
        markup: Markup = PLAIN,
    ):
        self._token_bytes = token_bytes
        self._hidden_ids: frozenset[int] = frozenset() if shows_special else token_bytes.special_ids
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_first = context is not None
        self._num_start_spaces = 0 if context is None else token_bytes.pieces.num_start_spaces
        self._marks, self._dropped = markup.marks, dict.fromkeys(map(ord, markup.reserved))
        for id in self._relevant_tokens(context or ()):
            self.push(id)

    def _relevant_tokens(self, context: Sequence[int]) -> Sequence[int]:
        """Returns the last tokens of ``context`` that matter: they show whether the text is at its beginning,
        and hold an unfinished character."""
        taken, size = 0, 0
        for id in reversed(context):
            taken += 1
            size += 0 if id in self._hidden_ids else len(self._token_bytes(id))
            if size > 4 + self._num_start_spaces:  # a character and the spaces that a beginning loses
                break
        return context[len(context) - taken :]

    def push(self, id: int) -> str:
        """Returns the characters that the token completes."""
        if id in self._marks:
            return self._utf8.decode(b"", final=True) + self._marks[id]
        if id in self._hidden_ids:
            return ""
        chunk = self._token_bytes.first(id) if self._is_first else self._token_bytes(id)
        if not self._token_bytes(id):
            return ""
        self._is_first = False
        while self._num_start_spaces and chunk.startswith(b" "):
            chunk, self._num_start_spaces = chunk[1:], self._num_start_spaces - 1
        self._num_start_spaces = 0 if chunk else self._num_start_spaces
        text = self._utf8.decode(chunk)
        return text.translate(self._dropped) if self._dropped else text

    def flush(self) -> str:
        """Returns what is left of a character that was not completed."""
        return self._utf8.decode(b"", final=True)
