"""A model's tokenizer in the form that llguidance takes, and llguidance's failures as ValueErrors.

This module imports nothing that starts threads: the process that tries grammars forks.
"""

import contextlib
import json
import re
import secrets
from collections.abc import Iterable, Iterator
from typing import Any

import llguidance
from tokenizers import Tokenizer

LIMITS = llguidance.LLParserLimits(verbose_errors=False)
STEPS = 8  # tokens for which a tried grammar is followed
# A comment, string or expression of a Lark grammar, which may contain text like a token's name, or a name.
LARK = re.compile(r'//[^\n]*|"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|(<[^<>\s"]+>)')


def tokenizer_spec(tokenizer: Tokenizer, vocab_size: int, end_ids: Iterable[int]) -> dict[str, Any]:
    """Returns the JSON-able argument of ``make_tokenizer``, from which another process can make the same
    tokenizer.

    llguidance tokenizes the text that a grammar forces. That text must not match the name of a token that
    stands for no text of its own, and nothing may change the text. So such tokens get names that nobody can
    guess, and all normalizer rules except those for spaces are left out. ``named`` has the token ids by their
    real names.
    """
    ends = sorted(i for i in end_ids if 0 <= i < vocab_size)
    if not ends:
        raise ValueError("the model names no end-of-text token, which an answer with a grammar needs")
    made = json.loads(tokenizer.to_str())
    largest = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=0)
    if largest >= vocab_size:
        raise ValueError(f"vocab size too small: the tokenizer has the id {largest}, the model {vocab_size}")
    # An added token beyond the model's vocabulary, such as a fine-tune's [PAD], is never sampled.
    added = {token["content"]: token for token in made["added_tokens"] if token["id"] < vocab_size}
    named = {name: t["id"] for name, t in added.items() if is_apart(name, is_special=t["special"])}
    for i in ends:
        if (name := tokenizer.id_to_token(i)) is not None:
            named[name] = i
            added.setdefault(name, {"id": i, "content": name})
    nonce = secrets.token_hex(16)
    hidden = {name: f"<{nonce} {i}>" for name, i in named.items()}
    made["added_tokens"] = sorted((_hide(t, hidden) for t in added.values()), key=lambda t: t["id"])
    _rename(made["model"], hidden)
    made["normalizer"] = _spaces_only(made["normalizer"])
    made["pre_tokenizer"] = _splits_only(made["pre_tokenizer"])
    made |= {"truncation": None, "padding": None, "post_processor": None}
    return {"tokenizer": json.dumps(made), "vocab_size": vocab_size, "end_ids": ends, "named": named}


def is_apart(name: str, *, is_special: bool) -> bool:
    """Returns whether no text in a grammar matches an added token: llguidance takes it for special, for its
    form whatever its flag says. A grammar writes it as ``<[id]>``."""
    return is_special or re.fullmatch("<.*>", name, re.S) is not None


def _hide(token: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Returns an added token, special if ``names`` has a hidden name for it; it strips no spaces around it
    and also matches inside words."""
    name = token["content"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token["id"], "content": names.get(name, name), **flags, "special": name in names}


def _rename(model: dict[str, Any], names: dict[str, str]) -> None:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(name, name): i for name, i in vocabulary.items()}
    else:  # Unigram: pieces with scores, in the order of ids
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if model.get("merges"):
        pairs = [tuple(m.split(" ", 1) if isinstance(m, str) else m) for m in model["merges"]]
        model["merges"] = [[a, b] for a, b in pairs if not {a, b, a + b} & names.keys()]


def _spaces_only(normalizer: dict[str, Any] | None) -> dict[str, Any] | None:
    """Returns the normalizer with only the rules for spaces (which tokens spell in their own way): others may
    change the text."""
    if normalizer is None or normalizer["type"] != "Sequence":
        parts = [normalizer]
    else:
        parts = normalizer["normalizers"]
    kept = [p for p in parts if p and p["type"] == "Replace" and p.get("pattern") == {"String": " "}]
    return {"type": "Sequence", "normalizers": kept} if kept else None


def _splits_only(pre_tokenizer: Any) -> Any:
    """Returns the pre-tokenizer changed so that it adds no space in front and keeps the text at which it
    splits."""
    if isinstance(pre_tokenizer, list):
        return [_splits_only(part) for part in pre_tokenizer]
    if not isinstance(pre_tokenizer, dict):
        return pre_tokenizer
    made = {key: _splits_only(value) for key, value in pre_tokenizer.items()}
    if "add_prefix_space" in made and pre_tokenizer["type"] == "ByteLevel":
        made["add_prefix_space"] = False
    return made | ({"behavior": "Isolated"} if made.get("behavior") == "Removed" else {})


def by_id(lark: str, named: dict[str, int]) -> str:
    """Returns the Lark grammar with special tokens written by id instead of by name."""

    def number(found: re.Match[str]) -> str:
        name = found[1]
        return f"<[{named[name]}]>" if name in named else found[0]

    return LARK.sub(number, lark)


def make_tokenizer(spec: dict[str, Any]) -> llguidance.LLTokenizer:
    """Makes the tokenizer; raises ValueError with one line if llguidance cannot use it."""
    try:
        with panics_as_errors():
            return llguidance.LLTokenizer(
                spec["tokenizer"], n_vocab=spec["vocab_size"], eos_token=spec["end_ids"]
            )
    except ValueError as error:
        raise ValueError(f"llguidance cannot use this model's tokenizer: {one_line(str(error))}") from None


def try_grammar(tokenizer: llguidance.LLTokenizer, source: str) -> tuple[llguidance.LLMatcher | None, str]:
    """Returns a matcher that has made its first mask, or None and the reason why it failed."""
    try:
        with panics_as_errors():
            matcher = llguidance.LLMatcher(tokenizer, source, log_level=0, limits=LIMITS)
            matcher.compute_bitmask()  # some limits show only here
            return (None, one_line(matcher.get_error())) if matcher.is_error() else (matcher, "")
    except ValueError as error:
        return None, str(error)


def follow(matcher: llguidance.LLMatcher, ends: Iterable[int]) -> str:
    """Returns the reason why the matcher fails within a few tokens, or "". It is needed because many grammars
    become too large only after some tokens.

    At each step it takes one allowed token by a fixed rule, and stops if only end tokens are allowed.
    """
    try:
        with panics_as_errors():
            for step in range(STEPS):
                allowed = int.from_bytes(matcher.compute_bitmask(), "little")
                for end in ends:
                    allowed &= ~(1 << end)
                if matcher.is_error() or not allowed:
                    break
                matcher.consume_token(_bit(allowed, step))
            return one_line(matcher.get_error()) if matcher.is_error() else ""
    except ValueError as error:
        return str(error)


def _bit(bits: int, step: int) -> int:
    """Returns the index of a set bit: the lowest above a fraction of the length that changes with the
    step."""
    above = bits.bit_length() * (step * 5 % STEPS) // STEPS
    rest = bits >> above
    return above + (rest & -rest).bit_length() - 1


@contextlib.contextmanager
def panics_as_errors() -> Iterator[None]:
    """Turns a panic in Rust, which is not an Exception in Python, into a ValueError."""
    try:
        yield
    except Exception:
        raise
    except BaseException as error:
        if type(error).__module__ != "pyo3_runtime":
            raise
        raise ValueError(f"llguidance failed: {one_line(str(error))}") from None


def one_line(text: str) -> str:
    """Returns llguidance's message without its excerpt of the grammar."""
    if text.startswith("NoExtension"):
        return "no answer can follow it"
    message = re.split(r"\n +\d+ \| |<non-verbose/>", text)[0]
    return " ".join(message.split())[:300]
