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

from jmoe.engine.text.tokenizer_files import guarded

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """The letters with which byte-level tokens spell bytes: printable bytes as themselves, others from U+0100
    on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


ALPHABET = _byte_alphabet()


class Pieces:
    """How a decoder turns single tokens into bytes.

    known: False if the decoder has a part that is not understood here.
    cut: number of spaces that the beginning of a text loses.
    cut_end: number of spaces that the end of a text loses.
    bare_start: whether the first token loses all its spaces instead.
    """

    def __init__(self, decoder: dict[str, Any] | None):
        self.known, self.cut, self.cut_end, self.bare_start = decoder is not None, 0, 0, False
        self._byte_level = self._fallback = False
        self._replaced: list[tuple[str, str]] = []
        for part in _flat(decoder or {}):
            self._take(part)

    def _take(self, part: dict[str, Any]) -> None:
        kind, pattern = part.get("type"), part.get("pattern")
        if kind == "ByteLevel":
            self._byte_level = True
        elif kind == "ByteFallback":
            self._fallback = True
        elif kind == "Replace" and isinstance(pattern, dict) and "String" in pattern:
            self._replaced.append((pattern["String"], part["content"]))
        elif kind == "Metaspace":
            self._replaced.append((part["replacement"], " "))
            self.bare_start = part.get("prepend_scheme", "always") != "never"
        elif kind == "Strip" and part.get("content") == " ":
            self.cut, self.cut_end = self.cut + part["start"], self.cut_end + part["stop"]
        elif kind != "Fuse":
            self.known = False

    def bytes_of(self, token: str) -> bytes:
        if self._byte_level:
            try:
                return bytes(map(ALPHABET.__getitem__, token))
            except KeyError:  # an added token is spelled as plain text
                return token.encode()
        for old, new in self._replaced:
            token = token.replace(old, new)
        found = BYTE_PIECE.fullmatch(token) if self._fallback else None
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
        self.special = frozenset(id for id, token in added.items() if token.special)
        self._known: dict[int, bytes] = {}
        self._anchor: tuple[int, str] | None = None

    def __call__(self, id: int) -> bytes:
        """The bytes of a token. Raises ValueError if the library fails on the token."""
        if (known := self._known.get(id)) is None:
            known = self._known[id] = self._bytes(id)
        return known

    def _bytes(self, id: int) -> bytes:
        with guarded("decode a token"):
            token = self.tokenizer.id_to_token(id)
            if token is None:
                return b""
            return self.pieces.bytes_of(token) if self.pieces.known else self._difference(id)

    def _difference(self, id: int) -> bytes:
        """For decoders that are not known: the bytes that the token adds after a word."""
        if self._anchor is None:
            words = (i for i in self.tokenizer.get_vocab().values() if i not in self.special)
            word = next((i for i in words if self.tokenizer.decode([i]).isalnum()), -1)
            self._anchor = word, "" if word < 0 else self.tokenizer.decode([word])
        word, text = self._anchor
        both = self.tokenizer.decode([id] if word < 0 else [word, id], skip_special_tokens=False)
        return both.removeprefix(text).encode()

    def first(self, id: int) -> bytes:
        """The bytes of a token that is the first of a text."""
        if self.pieces.known:
            return self(id).replace(b" ", b"") if self.pieces.bare_start else self(id)
        with guarded("decode a token"):
            return self.tokenizer.decode([id], skip_special_tokens=False).encode()


class GrowingText:
    """Text that grows token by token, in whole characters; a broken character becomes U+FFFD.

    before: tokens that the text continues; None means unknown text, so that all bytes of every token count.
    shows_special: whether special tokens are spelled out.
    """

    def __init__(
        self,
        token_bytes: TokenBytes,
        before: Sequence[int] | None = None,
        *,
        shows_special: bool = False,
    ):
        self._bytes = token_bytes
        self._hidden: frozenset[int] = frozenset() if shows_special else token_bytes.special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first, self._cut = before is not None, 0 if before is None else token_bytes.pieces.cut
        for id in self._context(before or ()):
            self.push(id)

    def _context(self, before: Sequence[int]) -> Sequence[int]:
        """The last tokens of ``before`` that matter: they show whether the text is at its beginning, and hold
        an unfinished character."""
        taken, size = 0, 0
        for id in reversed(before):
            taken += 1
            size += 0 if id in self._hidden else len(self._bytes(id))
            if size > 4 + self._cut:  # longer than a character and the spaces that a beginning loses
                break
        return before[len(before) - taken :]

    def push(self, id: int) -> str:
        """The characters that the token completes."""
        if id in self._hidden:
            return ""
        chunk = self._bytes.first(id) if self._first else self._bytes(id)
        if not self._bytes(id):
            return ""
        self._first = False
        while self._cut and chunk.startswith(b" "):
            chunk, self._cut = chunk[1:], self._cut - 1
        self._cut = 0 if chunk else self._cut
        return self._utf8.decode(chunk)

    def flush(self) -> str:
        """What is left of a character that was not completed."""
        return self._utf8.decode(b"", final=True)
