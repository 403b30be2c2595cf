"""Tests JSON schemas by their own standard: valid ones, keywords without effect, refusals."""

import json

import jsonschema
import numpy as np
import pytest
from support.server.fake_engine import EOS, VOCAB, ByteCodec
from support.server.schema_family import document, instances, walk

from jmoe.engine.grammar.grammar import Grammar, GrammarCompiler, schema_grammar
from jmoe.engine.grammar.schema_keywords import ecma

TIGHT = {"x-guidance": {"whitespace_flexible": False}}


@pytest.fixture(scope="module")
def compiler():
    return GrammarCompiler(ByteCodec.tokenizer, VOCAB, [EOS])


def accepts(compiler, schema, value) -> bool:
    constraint = compiler.compile(schema_grammar(schema | TIGHT)).constraint()
    for token in [*json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(), EOS]:
        if not constraint.allowed()[token // 32] >> (token % 32) & 1:
            return False
        constraint.accept(token)
    return True


# ---- a family at random ----------------------------------------------------------------------------


@pytest.mark.parametrize("part", range(4))
def test_answers_are_valid_and_what_can_be_satisfied_is_not_called_unsatisfiable(compiler, part):
    rng, compiled, candidates = np.random.default_rng(part), 0, instances()[::40]
    for _ in range(25):
        schema = document(rng)
        validator = jsonschema.Draft202012Validator(schema)
        try:
            grammar = compiler.compile(schema_grammar(schema))
        except ValueError as refusal:
            assert any(w in str(refusal) for w in ("nsatisfiable", "oneOf", "Properties")), refusal
            # llguidance says so of a definition too, even if nothing uses it.
            if "nsatisfiable" in str(refusal) and "while processing" not in str(refusal):
                assert not any(map(validator.is_valid, candidates)), (schema, refusal)
            continue
        compiled += 1
        answers = [walk(grammar.constraint(), rng) for _ in range(3)]
        for answer in filter(None, answers):
            assert validator.is_valid(json.loads(answer)), (schema, answer)
    assert compiled > 4


# ---- satisfiable ones ------------------------------------------------------------------------------

S, PAIR = {"type": "string"}, {"a": "x", "b": "y"}
CAT = {
    "type": "object",
    "properties": {"kind": {"const": "cat"}, "lives": {"type": "integer"}},
    "required": ["kind"],
}
DOG = {"type": "object", "properties": {"kind": {"enum": ["dog", "puppy"]}, "name": S}, "required": ["kind"]}
BASE = {"type": "object", "properties": {"a": S}, "required": ["a"]}
SATISFIABLE = {  # schema, valid answers, invalid answers or answers that a closed object does not allow
    "required beyond properties": (BASE | {"required": ["a", "b"]}, [PAIR], [{"a": "x"}, PAIR | {"c": 1}]),
    "anyOf with properties": (
        {"type": "object", "properties": {"a": S}, "anyOf": [
            {"properties": {"b": S}, "required": ["b"]}, {"properties": {"c": S}, "required": ["c"]}]},
        [{"b": "x"}, PAIR, {"a": "x", "c": "y"}], [{}, {"a": "x"}, {"b": 1}]),
    "oneOf with properties": (
        {"type": "object", "properties": {"k": {"enum": ["a", "b"]}}, "required": ["k"], "oneOf": [
            {"properties": {"k": {"const": "a"}, "x": S}, "required": ["x"]},
            {"properties": {"k": {"const": "b"}, "y": S}, "required": ["y"]}]},
        [{"k": "a", "x": "1"}, {"k": "b", "y": "1"}], [{"k": "a", "y": "1"}, {"k": "c", "x": "1"}]),
    "$ref with properties": (
        {"$defs": {"base": BASE}, "$ref": "#/$defs/base", "properties": {"b": S}, "required": ["b"]},
        [PAIR], [{"a": "x"}, {"b": "y"}]),
    "$ref once alone, once not": (
        {"$defs": {"base": BASE}, "type": "object", "required": ["p", "q"], "properties": {
            "p": {"$ref": "#/$defs/base"},
            "q": {"$ref": "#/$defs/base", "properties": {"b": S}, "required": ["b"]}}},
        [{"p": {"a": "x"}, "q": PAIR}], [{"p": {"a": "x"}, "q": {"a": "x"}}]),
    "allOf": ({"allOf": [BASE, {"properties": {"b": S}, "required": ["b"]}]}, [PAIR], [{"a": "x"}]),
    "allOf of references, nested": (
        {"$defs": {"one": {"type": "object", "properties": {"p": BASE}}, "two": {"properties": {
            "p": {"properties": {"b": S}, "required": ["b"]}}, "required": ["p"]}},
         "allOf": [{"$ref": "#/$defs/one"}, {"$ref": "#/$defs/two"}]},
        [{"p": PAIR}], [{"p": {"a": "x"}}, {}]),
    "a union that tells its branches apart": (
        {"$defs": {"cat": CAT, "dog": DOG}, "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
         "discriminator": {"propertyName": "kind"}},
        [{"kind": "cat", "lives": 9}, {"kind": "puppy", "name": "x"}],
        [{"kind": "cow"}, {"kind": "cat", "name": "x"}]),
    "a union by what is required": (
        {"oneOf": [BASE, {"type": "object", "properties": {"b": S}, "required": ["b"]}]},
        [{"a": "x"}, {"b": "y"}], [PAIR, {}]),
    "a union by type": ({"oneOf": [S, {"type": "null"}, BASE]}, ["x", None, {"a": "x"}], [1]),
    "an open property of a closed one": (
        BASE | {"additionalProperties": True}, [{"a": "x", "z": 1}], [{"z": 1}]),
    "minProperties beyond properties": (
        {"type": "object", "properties": {"a": S}, "minProperties": 0}, [{}, {"a": "x"}], [{"b": 1}]),
    "a name for every keyword": (
        {"type": "object", "required": ["allOf"],
         "properties": {n: {"const": 1} for n in ("allOf", "$ref", "properties", "type", "if")}},
        [{"allOf": 1}, {"allOf": 1, "$ref": 1, "if": 1}], [{}, {"allOf": 1, "x": 1}]),
    "z.record": (
        {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": S},
        [{}, PAIR], [{"a": 1}]),
    "z.record of an enum": (
        {"type": "object", "propertyNames": {"type": "string", "enum": ["a", "b"]}, "additionalProperties": S,
         "required": ["a", "b"]}, [PAIR], [{"a": "x"}, PAIR | {"c": "x"}]),
    "names by an expression": (
        {"type": "object", "propertyNames": {"pattern": "^[ab]$"}, "additionalProperties": S},
        [PAIR], [{"c": "x"}]),
    "what is required requires": (
        BASE | {"properties": {"a": S, "b": S}, "dependentRequired": {"a": ["b"]}},
        [PAIR], [{"a": "x"}]),
    "unevaluatedProperties alone": (
        {"type": "object", "properties": {"a": S}, "unevaluatedProperties": False}, [{"a": "x"}], [PAIR]),
    "unevaluatedProperties true": (
        {"type": "object", "properties": {"a": S}, "unevaluatedProperties": True},
        [{"a": "x"}, PAIR], [{"a": 1}]),
    "tuples": (
        {"prefixItems": [S], "items": False, "type": "array", "additionalItems": {}},
        [[], ["x"]], [["x", 1]]),
    "counts as floats": ({"type": "string", "maxLength": 2.0}, ["ab"], ["abc"]),
    "bounds of 64 bits": ({"type": "integer", "maximum": 2**63 - 1}, [0, 2**62], [2**63]),
}  # fmt: skip


@pytest.mark.parametrize(("schema", "valid", "others"), SATISFIABLE.values(), ids=SATISFIABLE)
def test_satisfiable_schemas_are_followed(compiler, schema, valid, others):
    for value in valid:
        jsonschema.Draft202012Validator(schema).validate(value)
        assert accepts(compiler, schema, value), value
    assert not [value for value in others if accepts(compiler, schema, value)]


@pytest.mark.parametrize("schema", [s for s, _, _ in SATISFIABLE.values()], ids=SATISFIABLE)
def test_text_and_object_are_one_schema(compiler, schema):
    text = json.dumps(schema, indent=1).replace('"a"', '"\\u0061"')
    assert compiler.source(Grammar("json_schema", text)) == compiler.source(schema_grammar(schema))


# ---- keywords --------------------------------------------------------------------------------------

NEUTRAL = [
    {"uniqueItems": False}, {"uniqueItems": True, "maxItems": 1}, {"propertyNames": {"type": "string"}},
    {"propertyNames": True}, {"propertyNames": {"title": "x"}}, {"dependentRequired": {}},
    {"dependentSchemas": {}}, {"dependentRequired": {"z": []}}, {"dependentSchemas": {"z": True}},
    {"dependencies": {}}, {"if": {"const": 1}},
    {"then": False}, {"else": {"const": 1}}, {"if": {"const": 1}, "then": True, "else": {}}, {"not": False},
    {"minContains": 2}, {"maxContains": 0}, {"contains": {"const": 7}, "minContains": 0}, {"minItems": 0},
    {"minProperties": 0}, {"minLength": 0}, {"required": []}, {"unevaluatedItems": True},
    {"additionalItems": False},
    {"unevaluatedProperties": {}}, {"format": "int32"}, {"format": "idn-email"}, {"format": "made-up"},
    {"$comment": "x", "title": "x", "description": "x", "default": 5, "examples": [5], "deprecated": True},
    {"readOnly": True, "writeOnly": True, "$anchor": "x", "$dynamicAnchor": "y", "$schema": "my-own"},
    {"contentEncoding": "base64", "contentMediaType": "a/b", "contentSchema": {"const": 1}},
    {"x-more": {"if": 1}},
    {"nullable": True, "discriminator": {"propertyName": "z"}, "externalDocs": {}, "xml": {}, "example": 5},
    {"$schema": "http://json-schema.org/draft-07/schema#"}, {"$id": "https://x.org/y"}, {"definitions": {}},
]  # fmt: skip
VALUES = ["", "ab", 7, 7.5, None, True, [], [1], {}, {"z": 1}]


@pytest.mark.parametrize("keywords", NEUTRAL, ids=str)
@pytest.mark.parametrize(
    "types", [["string", "number", "object", "array"], "integer"], ids=["any", "integer"]
)
def test_keywords_without_effect_have_none(compiler, keywords, types):
    schema = {"type": types, **keywords}
    validator = jsonschema.Draft202012Validator({"type": types, "maxItems": keywords.get("maxItems", 9)})
    for value in VALUES:
        assert accepts(compiler, schema, value) == validator.is_valid(value), value


NAMED = ["uniqueItems", "contains", "not", "dependentRequired", "propertyNames", "$dynamicRef", "oneOf", "if"]
UNABLE = [
    {"uniqueItems": True}, {"contains": {"const": 1}}, {"not": {"const": 1}},
    {"dependentRequired": {"a": ["b"]}},
    {"propertyNames": {"maxLength": 2}}, {"$dynamicRef": "#x"}, {"oneOf": [{"minimum": 1}, {"maximum": 5}]},
    {"if": {"const": 1}, "then": {"const": 1}},
]  # fmt: skip


@pytest.mark.parametrize(("name", "keywords"), list(zip(NAMED, UNABLE, strict=True)), ids=NAMED)
def test_what_cannot_be_followed_is_refused_by_name(compiler, name, keywords):
    with pytest.raises(ValueError, match=name.replace("$", r"\$")):
        compiler.compile(schema_grammar({"type": ["object", "array", "number"]} | keywords))


@pytest.mark.parametrize("value", [2**53 + 1, 10**400])
def test_numbers_beyond_float64_are_refused(compiler, value):
    for keywords in ({"const": value}, {"enum": [1, value]}):
        with pytest.raises(ValueError, match="beyond"):
            compiler.compile(schema_grammar(keywords))
    with pytest.raises(ValueError, match="beyond"):
        compiler.compile(schema_grammar({"type": "integer", "maximum": 10**400}))


def test_a_broken_schema_is_one_line(compiler):
    """Every value of a schema in turn is replaced by one of another type."""
    schema = {name: value for keywords in [*NEUTRAL, *UNABLE, *(s for s, _, _ in SATISFIABLE.values())]
              for name, value in keywords.items()}  # fmt: skip
    schema |= {"pattern": "a.b", "patternProperties": {"^x": {}}, "minimum": 1, "allOf": [True]}
    for name in schema:
        for broken in (5, "x", [], [5], [[]], {}, {"a": 5}, {"a": [[]]}, None, True, 1.5):
            try:
                assert compiler.source(schema_grammar(schema | {name: broken}))
            except ValueError as error:
                assert "\n" not in str(error)


# ---- texts -----------------------------------------------------------------------------------------

TEXTS = {
    "seconds": ({"format": "time"}, ["23:59:59Z", "00:00:00.5+01:30"],
                ["23:59:60Z", "24:00:00Z", "1:00:00Z"]),
    "leap days": ({"format": "date"}, ["2024-02-29", "2000-02-29", "0001-12-31"],
                  ["2023-02-29", "1900-02-29", "0000-01-01", "2024-04-31"]),
    "moments": ({"format": "date-time"}, ["2024-02-29T01:02:03Z"],
                ["2023-02-29T01:02:03Z", "2024-01-01T01:02:60Z"]),
    "a format and a pattern": ({"format": "date", "pattern": "^2"}, ["2024-01-01"], ["1999-01-01", "2x"]),
    "white space": ({"pattern": r"^\s[\s]\S[^\s]$"}, ["\u2028\ufeffab", " \u00a0\u0085\u0085"],
                    ["\u0085 ab", "  a "]),
    "any but line ends": ({"pattern": "^.[.]$"}, ["a.", "\u0085."], ["\u2028.", "\r.", "\n.", "ab"]),
    "brackets": ({"pattern": r"^[[&&~]]$"}, ["[]", "&]", "~]"], ["]", "a]"]),
    "surrogates": ({"pattern": r"^\ud83d\ude00\cA[^]$"}, ["\U0001f600\x01\n"], ["\U0001f600A\n"]),
    "names": ({"format": "hostname"}, ["a.b"], ["a" * 64]),
}  # fmt: skip


@pytest.mark.parametrize(("keywords", "valid", "others"), TEXTS.values(), ids=TEXTS)
def test_texts_are_those_of_the_standards(compiler, keywords, valid, others):
    schema = {"type": "string"} | keywords
    assert [text for text in valid if not accepts(compiler, schema, text)] == []
    assert [text for text in others if accepts(compiler, schema, text)] == []


def test_an_expression_that_both_dialects_read_alike_stays():
    for pattern in (r"^\d{2}-\w+\/(?<n>a|b)[a-z\]\\]*\.$", "", "a|b", r"\u00e9[\u0061-\u007a]", r"[^\]]"):
        assert ecma(pattern) == pattern
