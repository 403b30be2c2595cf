"""A lower bound of a text's tokens from its number of characters; a text that cannot fit is not tokenized."""

import json
from fractions import Fraction
from typing import Any

from tokenizers import Tokenizer

from jmoe.engine.text.token_bytes import ALPHABET
from jmoe.engine.text.tokenizer_files import guarded

CHUNK = 1 << 16  # characters that are counted at a time, which takes a few milliseconds
# The canonical decomposition of a character has at most four characters, and decomposing never makes a text
# shorter. So normalizers that compose characters (NFC, NFKC) make one character out of at most four.
COMPOSES = 4
LENGTHENS = ("Prepend", "ByteLevel", "NFD", "NFKD", "Lowercase")
KEEPS = ("ByteLevel", "Metaspace", "Digits", "UnicodeScripts", "Punctuation", "Split")
DROPS_SPACES = ("Whitespace", "WhitespaceSplit", "BertPreTokenizer")
BYTE_PIECES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


class _Unbounded(Exception):
    """One token may stand for any number of characters."""


class FewestTokens:
    """A lower bound of a text's tokens, proved for each part of a tokenizer; 0 if a part has no known bound.

    A token stands for at most as many characters of normalized text as it has letters itself (bytes, for a
    byte-level token), and the normalizer makes each of them out of a bounded number of characters. If a part
    drops white space, only other characters count.
    """

    def __init__(self, tokenizer: Tokenizer):
        with guarded("be looked at"):
            self._parts = [
                None if part is None else json.loads(part.__getstate__())
                for part in (tokenizer.normalizer, tokenizer.pre_tokenizer)
            ]
            self._model = _model_of(tokenizer)
            self._vocabulary = tokenizer.get_vocab(with_added_tokens=True)
            self._added_tokens = list(tokenizer.get_added_tokens_decoder().values())
        self._spaces_count = True
        try:
            self._characters = self._longest()
        except _Unbounded:
            self._characters = None
        del self._vocabulary

    def __call__(self, text: str, limit: int) -> int:
        """Returns a lower bound for ``text``; a bound that is not above ``limit`` may be returned as 0."""
        each = self._characters
        if each is None or len(text) <= limit * each:
            return 0
        pieces = (text[i : i + CHUNK] for i in range(0, len(text), CHUNK))
        count = len(text) if self._spaces_count else sum(len("".join(piece.split())) for piece in pieces)
        return -(-count // each)

    def _longest(self) -> Fraction:
        """Returns the largest number of a text's characters that one token can stand for."""
        normalizer, pre_tokenizer = self._parts
        shrinks = self._shrinks(normalizer)
        self._check_pre_tokenizer(pre_tokenizer)
        self._check_unknown(pre_tokenizer, normalizer)
        if any(token.lstrip or token.rstrip for token in self._added_tokens):
            self._spaces_count = False
        return shrinks * max(map(len, self._vocabulary))

    def _shrinks(self, part: dict[str, Any] | None) -> Fraction:
        """Returns how many characters the normalizer at most turns into one."""
        kind = None if part is None else part["type"]
        if part is None or kind in LENGTHENS:
            return Fraction(1)
        if kind == "Sequence":
            product = Fraction(1)
            for each in part["normalizers"]:
                product *= self._shrinks(each)
            return product
        if kind in ("NFC", "NFKC"):
            return Fraction(COMPOSES)
        if kind == "Strip":
            self._spaces_count = False
            return Fraction(1)
        if kind == "Replace" and "String" in part["pattern"] and part["content"]:
            return max(Fraction(1), Fraction(len(part["pattern"]["String"]), len(part["content"])))
        raise _Unbounded

    def _check_pre_tokenizer(self, part: dict[str, Any] | None) -> None:
        for each in _flat(part, "pretokenizers"):
            if each["type"] in DROPS_SPACES:
                self._spaces_count = False
            elif each["type"] not in KEEPS or each.get("behavior") == "Removed":
                raise _Unbounded

    def _check_unknown(self, pre_tokenizer: dict[str, Any] | None, normalizer: dict[str, Any] | None) -> None:
        """Checks that each character without a token becomes at least one token of its own; else it may be
        dropped, or many of them become one token."""
        parts = [*_flat(pre_tokenizer, "pretokenizers"), *_flat(normalizer, "normalizers")]
        by_bytes = any(part["type"] == "ByteLevel" for part in parts)
        model, vocabulary = self._model, self._vocabulary
        if model["type"] not in ("BPE", "Unigram"):
            raise _Unbounded
        if by_bytes and vocabulary.keys() >= ALPHABET.keys():
            return
        if model.get("byte_fallback") and vocabulary.keys() >= BYTE_PIECES:
            return
        if model["type"] == "Unigram" or model.get("fuse_unk") or model.get("unk_token") is None:
            raise _Unbounded


def _flat(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return [p for each in part[key] for p in _flat(each, key)] if part["type"] == "Sequence" else [part]


def _model_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the model's options, without its vocabulary."""
    model = tokenizer.model
    kind, names = type(model).__name__, ("byte_fallback", "fuse_unk", "unk_token")
    state = json.loads(model.__getstate__()) if kind == "Unigram" else {}
    return {"type": kind} | {name: state.get(name, getattr(model, name, None)) for name in names}
