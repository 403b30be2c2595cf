"""Tests what grammars let through against oracles that do not use llguidance, and hostile grammars."""

import json
import re

import jsonschema
import numpy as np
import pytest
from support.server.fake_engine import EOS, VOCAB, ByteCodec, byte_tokenizer

from jmoe.engine.grammar.check import GrammarChecker
from jmoe.engine.grammar.grammar import MAX_GRAMMAR_BYTES, Grammar, GrammarCompiler, one_of, schema_grammar
from jmoe.engine.grammar.json_schema import prepared

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{1,6}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "é"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def compiler():
    return GrammarCompiler(ByteCodec.tokenizer, VOCAB + 7, [EOS])


@pytest.fixture(scope="module")
def checker(compiler):
    checker = GrammarChecker(compiler.spec)
    yield checker
    checker.close()


def tokens_of(mask):
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def walk(constraint, rng):
    """Returns the text of a random answer that the constraint allows."""
    tokens = []
    while True:
        token = int(rng.choice(sorted(tokens_of(constraint.allowed()))))
        constraint.accept(token)
        if token == EOS:
            return bytes(tokens).decode()
        tokens.append(token)


def accepts(compiler, grammar, text):
    constraint = compiler.compile(grammar).constraint()
    for token in [*text.encode(), EOS]:
        if token not in tokens_of(constraint.allowed()):
            return False
        constraint.accept(token)
    return True


def test_every_answer_of_a_schema_is_valid(compiler):
    compiled, rng = compiler.compile(schema_grammar(PERSON)), np.random.default_rng(0)
    answers = [json.loads(walk(compiled.constraint(), rng)) for _ in range(30)]
    for answer in answers:
        jsonschema.validate(answer, PERSON)
    assert len({json.dumps(a) for a in answers}) > 20 and any(a.get("tags") for a in answers)


@pytest.mark.parametrize("change", [{"age": 121}, {"age": "1"}, {"name": "X"}, {"more": 1}, {"tags": ["c"]}])
def test_a_schema_refuses_what_is_not_valid(compiler, change):
    good = {"name": "bo", "age": 3}
    assert accepts(compiler, schema_grammar(PERSON), json.dumps(good))
    assert not accepts(compiler, schema_grammar(PERSON), json.dumps(good | change))


def test_every_answer_of_an_expression_matches_wholly(compiler):
    text, rng = r"(\d{2}-[ab]{1,3}|né+){1,2}\.", np.random.default_rng(1)
    compiled = compiler.compile(Grammar("regex", text))
    assert all(re.fullmatch(text, walk(compiled.constraint(), rng)) for _ in range(30))


def test_choices_are_taken_by_the_letter(compiler):
    texts = ["yes", "no/.*", "a\n\x00\t\\", 'q"[', "né日😀", "", "yesterday"]
    for text in texts:
        assert accepts(compiler, one_of(texts), text), text
    assert not any(accepts(compiler, one_of(texts), text) for text in ("ye", "no/x", "yest", " "))


def test_white_space_is_bounded(compiler):
    grammar = schema_grammar({"type": "object"})
    assert accepts(compiler, grammar, '{\n  "a": [1,\t2]\n}') and accepts(compiler, grammar, '{"a":1}')
    assert not accepts(compiler, grammar, "{" + " " * 17 + "}")


def test_end_of_text_exactly_where_the_answer_may_end(compiler):
    constraint = compiler.compile(Grammar("regex", "ab?")).constraint()
    assert tokens_of(constraint.allowed()) == {97}
    constraint.accept(97)
    assert tokens_of(constraint.allowed()) == {98, EOS}
    constraint.accept(98)
    assert tokens_of(constraint.allowed()) == {EOS}
    assert len(constraint.allowed()) == -(-(VOCAB + 7) // 32)


def test_answers_of_one_grammar_are_apart(compiler):
    compiled = compiler.compile(Grammar("regex", "ab|cd"))
    first, second = compiled.constraint(), compiled.constraint()
    first.accept(97)
    assert tokens_of(first.allowed()) == {98} and tokens_of(second.allowed()) == {97, 99}


def test_a_token_that_is_not_allowed_is_an_error_for_good(compiler):
    constraint = compiler.compile(Grammar("regex", "ab")).constraint()
    with pytest.raises(ValueError, match="the grammar failed"):
        constraint.accept(99)
    with pytest.raises(ValueError, match="the grammar failed"):
        constraint.allowed()


BAD = {
    "no schema": (Grammar("json_schema", '{"type": "thing"}'), "Invalid type: thing"),
    "unknown keyword": (Grammar("json_schema", '{"not": {}}'), "Unimplemented keys"),
    "not JSON": (Grammar("json_schema", "{"), ""),
    "remote": (Grammar("json_schema", '{"$ref": "http://127.0.0.1/x"}'), "does not fetch resources"),
    "nothing is valid": (Grammar("json_schema", '{"allOf": [{"type": "string"}, {"type": "null"}]}'), ""),
    "for ever in itself": (Grammar("json_schema", '{"$ref": "#"}'), "no answer can follow it"),
    "group": (Grammar("regex", "a(b"), "unclosed group"),
    "look-ahead": (Grammar("regex", "(?=a)b"), "look-around"),
    "name": (Grammar("lark", 'start: "a" | foo'), 'unknown name: "foo"'),
}


@pytest.mark.parametrize(("grammar", "cause"), BAD.values(), ids=BAD)
def test_bad_grammars_are_refused_in_one_line(compiler, checker, grammar, cause):
    for use in (compiler.compile, lambda g: checker.check(g.source())):
        with pytest.raises(ValueError) as refusal:
            use(grammar)
        text = str(refusal.value)
        assert cause in text and text and "\n" not in text and len(text) < 400


def chain(levels):
    """Returns a schema whose objects nest through references; without a limit it ends the process."""
    link = {f"r{i}": {"properties": {"a": {"$ref": f"#/$defs/r{i + 1}"}}} for i in range(levels)}
    return schema_grammar({"$ref": "#/$defs/r0", "$defs": link | {f"r{levels}": {"type": "string"}}})


HOSTILE = {
    "stack, by references": chain(1000),
    "stack, by rules": Grammar("lark", "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(5000))),
    "time": schema_grammar({"type": "integer", "multipleOf": 1_000_003}),
    "many at once": schema_grammar({"type": "object", "required": [f"p{i}" for i in range(7000)]}),
}  # fmt: skip


@pytest.mark.parametrize("grammar", HOSTILE.values(), ids=HOSTILE)
def test_hostile_grammars_end_a_child_and_not_the_server(compiler, checker, grammar):
    with pytest.raises(ValueError, match=r"too complex: compiling it takes more than 2 s or 256 MiB"):
        checker.check(grammar.source())
    checker.check(chain(40).source())  # the next child tries a depth that people write
    assert compiler.compile(chain(40))


def test_sizes_and_models_without_an_end(compiler):
    Grammar("regex", "a" * MAX_GRAMMAR_BYTES)
    with pytest.raises(ValueError, match="65537 bytes; the limit is 65536"):
        Grammar("regex", "a" * (MAX_GRAMMAR_BYTES + 1))
    with pytest.raises(ValueError, match="nested too deeply"):
        schema_grammar(deep(100_000))
    with pytest.raises(ValueError, match="no end-of-text token"):
        GrammarCompiler(ByteCodec.tokenizer, VOCAB, [])
    with pytest.raises(ValueError, match="vocab size too small"):
        GrammarCompiler(ByteCodec.tokenizer, VOCAB - 3, [5])


def test_a_token_that_was_added_beyond_the_model_is_never_allowed():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["[PAD]"])
    constraint = GrammarCompiler(tokenizer, VOCAB, [EOS]).compile(one_of(["a"])).constraint()
    allowed = np.flatnonzero(np.unpackbits(constraint.allowed().view(np.uint8), bitorder="little"))
    assert list(allowed) == [ord("a")]


def deep(levels):
    schema = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


def test_objects_with_named_properties_are_closed_where_the_schema_is_silent():
    def made(schema: dict) -> dict:
        return json.loads(prepared(json.dumps(schema)))

    inner = {"type": "object", "properties": {"b": {"type": "string"}}}
    plain = {"type": "object", "properties": {"a": inner, "c": {"type": "array", "items": inner}}}
    closed = made(plain)
    assert closed["additionalProperties"] is closed["properties"]["a"]["additionalProperties"] is False
    assert closed["properties"]["c"]["items"]["additionalProperties"] is False
    for kept in (plain | {"additionalProperties": True}, {"type": "object"}, {"allOf": [plain, inner]}):
        assert made(kept).get("additionalProperties") == kept.get("additionalProperties")
