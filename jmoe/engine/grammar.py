"""Grammars that an answer must follow, as masks over the vocabulary. llguidance does the work."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import llguidance
import numpy as np
from tokenizers import Tokenizer

MAX_GRAMMAR_BYTES = 64 * 1024
# Between the tokens of a JSON text. Bounded: a model could otherwise indent until its tokens are spent.
WHITESPACE = r"[ \n\t]{0,16}"
LIMITS = llguidance.LLParserLimits(verbose_errors=False)


@dataclass(frozen=True)
class Grammar:
    """What a whole answer must be: JSON that ``text``, a JSON schema, describes; what the regular expression
    ``text`` matches; or what ``text``, a Lark grammar in llguidance's dialect, derives from ``start``.

    Raises ValueError where the text exceeds the limit.
    """

    kind: Literal["json_schema", "regex", "lark"]
    text: str

    def __post_init__(self) -> None:
        size = len(self.text.encode(errors="replace"))
        if size > MAX_GRAMMAR_BYTES:
            raise ValueError(f"the grammar has {size} bytes; the limit is {MAX_GRAMMAR_BYTES}")

    def source(self) -> str:
        """The grammar in llguidance's own form; ValueError for a schema that is no JSON."""
        if self.kind == "regex":
            return llguidance.LLMatcher.grammar_from_regex(self.text)
        if self.kind == "lark":
            return llguidance.LLMatcher.grammar_from_lark(self.text)
        options = {"whitespace_pattern": WHITESPACE}
        return llguidance.LLMatcher.grammar_from_json_schema(self.text, defaults=options)  # type: ignore[arg-type]


def one_of(texts: Iterable[str]) -> Grammar:
    """The grammar of exactly these answers."""
    return Grammar("regex", "|".join("".join(map(_literal, text)) for text in texts))


def schema_grammar(schema: dict[str, Any]) -> Grammar:
    """The grammar of the JSON that ``schema`` describes; ValueError where it is no JSON itself.

    Objects with named properties hold no others unless the schema says so: every answer still satisfies it,
    and a model cannot go on adding properties until its tokens are spent.
    """
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        if '"allOf"' not in text:  # there each part would refuse what the others name
            closed = json.dumps(_closed(schema), ensure_ascii=False, allow_nan=False)
            text = closed if len(closed.encode(errors="replace")) <= MAX_GRAMMAR_BYTES else text
        return Grammar("json_schema", text)
    except RecursionError:
        raise ValueError("the schema is nested too deeply") from None


OPEN = ("additionalProperties", "patternProperties", "unevaluatedProperties")


def _closed(schema: Any) -> Any:
    """The schema with every object of named properties closed where it does not say."""
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)
    for name in ("properties", "patternProperties", "$defs", "definitions"):
        if isinstance(schema.get(name), dict):
            made[name] = {key: _closed(value) for key, value in schema[name].items()}
    for name in ("anyOf", "oneOf", "prefixItems"):
        if isinstance(schema.get(name), list):
            made[name] = [_closed(value) for value in schema[name]]
    for name in ("items", "additionalProperties"):
        made |= {name: _closed(schema[name])} if name in schema else {}
    if isinstance(schema.get("properties"), dict) and not any(name in schema for name in OPEN):
        made["additionalProperties"] = False
    return made


def _literal(character: str) -> str:
    plain = character.isascii() and character.isalnum()
    return character if plain else f"\\x{{{ord(character):x}}}"


class GrammarConstraint:
    """One answer's place in its grammar (``engine.request.Constraint``).

    Both methods raise ValueError with one line where the grammar has become too costly to follow, and
    ``accept`` for a token that it does not allow; from then on no other answer is possible.
    """

    def __init__(self, matcher: llguidance.LLMatcher, words: int):
        self.matcher, self.words = matcher, words

    def allowed(self) -> np.ndarray:
        """uint32 ``[words]``: the tokens that may come next; end of text where the answer may end."""
        mask = np.frombuffer(self.matcher.compute_bitmask(), np.uint32)[: self.words]
        self._check()
        return mask

    def accept(self, token_id: int) -> None:
        self.matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self.matcher.is_error():
            raise ValueError(f"the grammar failed: {one_line(self.matcher.get_error())}")


class CompiledGrammar:
    """What the constraints of a grammar's answers are copies of."""

    def __init__(self, matcher: llguidance.LLMatcher, words: int):
        self.matcher, self.words = matcher, words

    def constraint(self) -> GrammarConstraint:
        return GrammarConstraint(self.matcher.deep_copy(), self.words)


class GrammarCompiler:
    """Grammars over one tokenizer's tokens. vocab_size: the model's.

    end_ids: the tokens that end an answer. Takes about a second for a large vocabulary. Raises ValueError
    where there are no end ids or llguidance cannot read the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Iterable[int]):
        self.words = -(-vocab_size // 32)
        self.spec = tokenizer_spec(tokenizer, vocab_size, end_ids)
        self.tokenizer = make_tokenizer(self.spec)

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Raises ValueError with one line that says what is wrong with the grammar.

        For grammars of one's own: a hostile one can end the process or never come back. ``grammar_check``
        tries it in a process that may.
        """
        matcher, error = try_grammar(self.tokenizer, grammar.source())
        if matcher is None:
            raise ValueError(error)
        return CompiledGrammar(matcher, self.words)


def tokenizer_spec(tokenizer: Tokenizer, vocab_size: int, end_ids: Iterable[int]) -> dict[str, Any]:
    """What ``make_tokenizer`` takes, as JSON has it: another process can make the same one."""
    ends = sorted(i for i in end_ids if 0 <= i < vocab_size)
    if not ends:
        raise ValueError("the model names no end-of-text token, which an answer with a grammar needs")
    beyond = {id for id in tokenizer.get_vocab().values() if id >= vocab_size}
    only_added = beyond <= tokenizer.get_added_tokens_decoder().keys()  # a fine-tune's [PAD]
    size = 1 + max(beyond, default=-1) if only_added else 0
    return {"tokenizer": tokenizer.to_str(), "vocab_size": max(size, vocab_size), "end_ids": ends}


def make_tokenizer(spec: dict[str, Any]) -> llguidance.LLTokenizer:
    tokenizer = Tokenizer.from_str(spec["tokenizer"])
    tokenizer.no_padding()
    tokenizer.no_truncation()
    text, size = tokenizer.to_str(), spec["vocab_size"]
    try:
        return llguidance.LLTokenizer(text, n_vocab=size, eos_token=spec["end_ids"])
    except ValueError as error:
        raise ValueError(f"llguidance cannot use this model's tokenizer: {one_line(str(error))}") from None


def try_grammar(tokenizer: llguidance.LLTokenizer, source: str) -> tuple[llguidance.LLMatcher | None, str]:
    """A matcher that has made its first mask, or None and why there is none."""
    matcher = llguidance.LLMatcher(tokenizer, source, log_level=0, limits=LIMITS)
    matcher.compute_bitmask()  # some limits show only here
    return (None, one_line(matcher.get_error())) if matcher.is_error() else (matcher, "")


def one_line(text: str) -> str:
    """llguidance's message without its excerpt of the grammar."""
    if text.startswith("NoExtension"):
        return "no answer can follow it"
    message = re.split(r"\n +\d+ \| |<non-verbose/>", text)[0]
    return " ".join(message.split())[:300]
