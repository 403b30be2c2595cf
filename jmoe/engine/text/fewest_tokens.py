"""How few tokens a text can have, from its number of characters: what cannot fit is not tokenized at all."""

import json
from fractions import Fraction
from typing import Any

from tokenizers import Tokenizer

from jmoe.engine.text.token_bytes import ALPHABET
from jmoe.engine.text.tokenizer_files import guarded

CHUNK = 1 << 16  # characters that are looked at in one go, a few milliseconds
# A character has at most four in its canonical decomposition, and decomposing never makes a text shorter:
# what composes characters (NFC, NFKC) makes one of at most four.
COMPOSES = 4
LENGTHENS = ("Prepend", "ByteLevel", "NFD", "NFKD", "Lowercase")
KEEPS = ("ByteLevel", "Metaspace", "Digits", "UnicodeScripts", "Punctuation", "Split")
DROPS_SPACES = ("Whitespace", "WhitespaceSplit", "BertPreTokenizer")
BYTE_PIECES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


class _Unbounded(Exception):
    """One token may stand for any number of characters."""


class FewestTokens:
    """A lower bound, proved part by part of a tokenizer; 0 where a part is not known to have one.

    A token stands for at most as many characters of normalized text as it has letters itself (a byte-level
    one: bytes), and the normalizer makes one of at most so many. Where a part drops white space, only other
    characters count.
    """

    def __init__(self, tokenizer: Tokenizer):
        with guarded("be looked at"):
            self._parts = [
                None if part is None else json.loads(part.__getstate__())
                for part in (tokenizer.normalizer, tokenizer.pre_tokenizer)
            ]
            self._model = _model_of(tokenizer)
            self._vocabulary = tokenizer.get_vocab(with_added_tokens=True)
            self._added = list(tokenizer.get_added_tokens_decoder().values())
        self._spaces_count = True
        try:
            self._characters = self._longest()
        except _Unbounded:
            self._characters = None
        del self._vocabulary

    def __call__(self, text: str, limit: int) -> int:
        """At least so many tokens, or something up to ``limit`` where it cannot be more."""
        each = self._characters
        if each is None or len(text) <= limit * each:
            return 0
        pieces = (text[i : i + CHUNK] for i in range(0, len(text), CHUNK))
        count = len(text) if self._spaces_count else sum(len("".join(piece.split())) for piece in pieces)
        return -(-count // each)

    def _longest(self) -> Fraction:
        """The most characters of a text that one token stands for."""
        normalizer, pre_tokenizer = self._parts
        shrinks = self._shrinks(normalizer)
        self._check_pre_tokenizer(pre_tokenizer)
        self._check_unknown(pre_tokenizer, normalizer)
        if any(token.lstrip or token.rstrip for token in self._added):
            self._spaces_count = False
        return shrinks * max(map(len, self._vocabulary))

    def _shrinks(self, part: dict[str, Any] | None) -> Fraction:
        """Of how many characters the normalizer makes one."""
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
        """Characters without a token must have one each: they may be dropped, or many become one."""
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


def _flat(part: dict[str, Any] | None, within: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return [p for each in part[within] for p in _flat(each, within)] if part["type"] == "Sequence" else [part]


def _model_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """The model's options, without its vocabulary."""
    model = tokenizer.model
    kind, names = type(model).__name__, ("byte_fallback", "fuse_unk", "unk_token")
    state = json.loads(model.__getstate__()) if kind == "Unigram" else {}
    return {"type": kind} | {name: state.get(name, getattr(model, name, None)) for name in names}
