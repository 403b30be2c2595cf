"""Grammars that an answer must follow, as masks over the vocabulary, computed by llguidance."""

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import llguidance
import numpy as np
from tokenizers import Tokenizer

from jmoe.engine.grammar.json_schema import prepared
from jmoe.engine.grammar.tokens import (
    by_id,
    make_tokenizer,
    one_line,
    panics_as_errors,
    tokenizer_spec,
    try_grammar,
)

MOST = 0.9  # share of the tokens that free text allows at least
_SLASHES = re.compile(r"(\\.)|/", re.S)  # those that nothing escapes have no group
MAX_GRAMMAR_BYTES = 64 * 1024
# Whitespace between the tokens of a JSON text. Bounded, else a model could indent until max_tokens.
WHITESPACE = r"[ \n\t]{0,16}"


@dataclass(frozen=True)
class Grammar:
    """The grammar of a whole answer. Raises ValueError if the text exceeds the limit.

    kind: form of the text: "json_schema" for JSON that a JSON schema describes, "regex" for text that a
        regular expression matches, "lark" for text that a Lark grammar in llguidance's dialect derives from
        ``start``.
    text: schema, expression or grammar.
    has_inner_text: whether free text is also where the answer may not end, as in messages before the last.
    """

    kind: Literal["json_schema", "regex", "lark"]
    text: str
    has_inner_text: bool = False

    def __post_init__(self) -> None:
        size = len(self.text.encode(errors="replace"))
        if size > MAX_GRAMMAR_BYTES:
            raise ValueError(f"the grammar has {size} bytes; the limit is {MAX_GRAMMAR_BYTES}")

    def source(self) -> str:
        """Returns the grammar in llguidance's own form; raises ValueError for a schema that is not JSON or
        not supported.

        If a schema does not say it, objects with named properties have no other ones (``json_schema``).
        """
        if self.kind == "regex":
            return llguidance.LLMatcher.grammar_from_regex(self.text)
        if self.kind == "lark":
            return llguidance.LLMatcher.grammar_from_lark(self.text)
        options = {"whitespace_pattern": WHITESPACE}
        return llguidance.LLMatcher.grammar_from_json_schema(prepared(self.text), defaults=options)  # type: ignore[arg-type]


def lark_rule(grammar: Grammar) -> str:
    """Returns the right side of a Lark rule that derives what ``grammar`` derives, as a part of another
    grammar. Raises ValueError for a grammar that is no part: Lark, or a schema that is no object."""
    if grammar.kind == "regex":
        return "/" + _SLASHES.sub(lambda found: found[1] or "\\/", grammar.text) + "/"
    schema = json.loads(prepared(grammar.text)) if grammar.kind == "json_schema" else None
    if not isinstance(schema, dict):
        raise ValueError("only a JSON schema or a regular expression can be joined with calls")
    options = {"x-guidance": {"whitespace_pattern": WHITESPACE}}
    return f"%json {json.dumps(options | schema, ensure_ascii=False)}"


def one_of(texts: Iterable[str]) -> Grammar:
    """Returns the grammar of exactly these answers."""
    return Grammar("regex", "|".join("".join(map(_literal, text)) for text in texts))


def schema_grammar(schema: dict[str, Any]) -> Grammar:
    """Returns the grammar of the JSON that ``schema`` describes; raises ValueError if ``schema`` itself is
    not JSON."""
    try:
        return Grammar("json_schema", json.dumps(schema, ensure_ascii=False, allow_nan=False))
    except RecursionError:
        raise ValueError("the schema is nested too deeply") from None


def _literal(character: str) -> str:
    plain = character.isascii() and character.isalnum()
    return character if plain else f"\\x{{{ord(character):x}}}"


class GrammarConstraint:
    """The state of one answer in its grammar (``engine.request.Constraint``).

    The methods raise ValueError with one line if the grammar has become too costly to follow; ``accept``
    also raises it for a token that the grammar does not allow. After an error they go on to fail.

    end_ids: tokens that end an answer.
    is_open: whether the answer may end here and may also go on: it is free text, or may be whole. With
        ``has_inner_text`` it is also open from a mask of most tokens on, until a token is refused.
    """

    def __init__(
        self, matcher: llguidance.LLMatcher, words: int, end_ids: Collection[int], has_inner_text: bool
    ):
        self.matcher, self.words, self.end_ids = matcher, words, end_ids
        self.has_inner_text, self._is_text = has_inner_text, False
        self.is_open = self._may_end_or_go_on()

    def allowed(self) -> np.ndarray:
        """Returns uint32 ``[words]``: a bit mask of the allowed next tokens, with end of text if the answer
        may end."""
        with panics_as_errors():
            mask = np.frombuffer(self.matcher.compute_bitmask(), np.uint32)[: self.words]
            self._check()
        if self.has_inner_text:
            self._is_text = int(np.unpackbits(mask.view(np.uint8)).sum()) > MOST * 32 * self.words
        return mask

    def is_allowed(self, token_id: int) -> bool:
        if token_id in self.end_ids:  # the matcher does not validate all that its masks have
            return bool(self.allowed()[token_id // 32] >> token_id % 32 & 1)
        with panics_as_errors():
            is_valid = self.matcher.validate_tokens([token_id]) == 1
            self._check()
        return is_valid

    def accept(self, token_id: int) -> None:
        with panics_as_errors():
            self.matcher.consume_token(token_id)
            self._check()
            self.is_open = self._may_end_or_go_on()

    def _may_end_or_go_on(self) -> bool:
        may_end = self._is_text or self.matcher.is_accepting()
        return may_end and not self.matcher.is_stopped()

    def _check(self) -> None:
        if self.matcher.is_error():
            raise ValueError(f"the grammar failed: {one_line(self.matcher.get_error())}")


class CompiledGrammar:
    """A compiled grammar; the constraint of each answer is a copy of its state."""

    def __init__(
        self, matcher: llguidance.LLMatcher, words: int, end_ids: Collection[int], has_inner_text: bool
    ):
        self.matcher, self.words, self.end_ids = matcher, words, end_ids
        self.has_inner_text = has_inner_text

    def constraint(self) -> GrammarConstraint:
        with panics_as_errors():
            return GrammarConstraint(self.matcher.deep_copy(), self.words, self.end_ids, self.has_inner_text)


class GrammarCompiler:
    """Compiles grammars over one tokenizer's tokens. Making a compiler takes about a second for a large
    vocabulary, and raises ValueError if there are no end ids or llguidance cannot read the tokenizer.

    vocab_size: vocabulary size of the model.
    end_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Iterable[int]):
        self.words = -(-vocab_size // 32)
        with panics_as_errors():
            self.spec = tokenizer_spec(tokenizer, vocab_size, end_ids)
        self.tokenizer = make_tokenizer(self.spec)

    def source(self, grammar: Grammar) -> str:
        """Returns the text that llguidance compiles for ``grammar`` over this tokenizer; raises ValueError
        for a schema that is not JSON or not supported."""
        return by_id(grammar.source(), self.spec["named"]) if grammar.kind == "lark" else grammar.source()

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Compiles a grammar; raises ValueError with one line that says what is wrong with it.

        It is only for trusted grammars: a hostile one can crash the process or never return. ``check`` tries
        it in a process that may crash.
        """
        matcher, error = try_grammar(self.tokenizer, self.source(grammar))
        if matcher is None:
            raise ValueError(error)
        return CompiledGrammar(matcher, self.words, frozenset(self.spec["end_ids"]), grammar.has_inner_text)
