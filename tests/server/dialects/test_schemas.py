"""Tests how schemas of functions are followed: strictly, leniently, or as any object."""

import json
import logging

import jsonschema
import pytest
from support.server.call_texts import WRITERS, Declared, plain
from support.server.fake_engine import byte_tokenizer

from jmoe.engine.grammar.check import TooCostly
from jmoe.engine.grammar.grammar import GrammarCompiler
from jmoe.server.dialects.dialect import format_dialect
from jmoe.server.dialects.formats import FORMATS
from jmoe.server.dialects.grammars.schemas import Followed, slim
from jmoe.server.dialects.json_call import JsonCall
from jmoe.server.dialects.reading.declared import kind_of, type_of, types_of
from jmoe.server.dialects.rules import AnswerRules

TOKENIZER = byte_tokenizer()
SIZE = TOKENIZER.get_vocab_size()
UNIQUE = {
    "type": "object",
    "properties": {"a": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}},
}
WRONG = {"type": "object", "properties": {"a": {"type": "arr"}}}


@pytest.fixture(scope="module")
def compiler():
    return GrammarCompiler(TOKENIZER, SIZE, [TOKENIZER.token_to_id("</s>")])


def dialect(name):
    return format_dialect(FORMATS[name], TOKENIZER, SIZE)


def allows(compiler, grammar, text):
    matcher = compiler.compile(grammar).matcher
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def test_what_says_nothing_about_validity_is_left_out():
    schema = {
        "title": "T",
        "description": "D" * 10**5,
        "properties": {"title": {"type": "string", "default": "x", "description": "d"}},
        "items": [{"examples": [1]}],
    }
    assert slim(schema) == {"properties": {"title": {"type": "string"}}, "items": [{}]}


def test_a_long_description_costs_no_grammar():
    long = Declared("f", {"type": "object", "properties": {}, "description": "x" * 70_000})
    assert len(dialect("hermes").grammar(AnswerRules([long], "auto", True)).text) < 1000


@pytest.mark.parametrize("name", ["hermes", "qwen_xml", "pythonic", "llama_json"])
def test_a_keyword_that_is_not_implemented(compiler, caplog, name):
    """Without strict it is left out, and told once; strict refuses it, by the function's name."""
    lenient, strict = Declared("f", UNIQUE), Declared("f", UNIQUE, True)
    made = dialect(name)
    with caplog.at_level(logging.INFO):
        grammars = [made.grammar(AnswerRules([lenient], "required", False)) for _ in range(2)]
    assert [r.message for r in caplog.records] == [
        "uniqueItems in tools is not followed unless strict is true"
    ]
    assert allows(compiler, grammars[0], WRITERS[name]([("f", {"a": [1, 1]})], plain))
    assert not allows(compiler, grammars[0], WRITERS[name]([("f", {"a": ["x"]})], plain))
    refused = made.grammar(AnswerRules([strict], "required", False))
    with pytest.raises(ValueError, match="uniqueItems"):
        compiler.compile(refused)
    with pytest.raises(ValueError, match=r"the parameters of 'f': .*uniqueItems"):
        made.followed.mended(lambda names: refused, [strict], compiler.compile)


@pytest.mark.parametrize("name", ["hermes", "qwen_xml", "pythonic"])
def test_a_schema_that_does_not_compile_becomes_any_object(compiler, name):
    made, functions = dialect(name), [Declared("bad", WRONG), Declared("now", None)]

    def make(names):
        return made.grammar(AnswerRules(functions, "required", True, names))

    with pytest.raises(ValueError, match="Invalid type: arr"):
        compiler.compile(make(()))
    grammar = made.followed.mended(make, functions, compiler.compile)
    assert allows(compiler, grammar, WRITERS[name]([("bad", {"x": "y", "z": 3})], plain))
    assert allows(compiler, grammar, WRITERS[name]([("bad", {})], plain))
    assert not allows(compiler, grammar, WRITERS[name]([("now", {"x": 1})], plain)), "others stay as they are"
    functions[0] = Declared("bad", WRONG, True)
    with pytest.raises(ValueError, match=r"the parameters of 'bad': .*Invalid type: arr"):
        made.followed.mended(make, functions, compiler.compile)


def test_mending_stops_where_trying_costs_too_much():
    def check(grammar):
        raise TooCostly("it is too complex")

    with pytest.raises(TooCostly):
        Followed().mended(lambda names: pytest.fail("made"), [Declared("f", {})], check)


def test_parameters_of_another_type_are_refused():
    for strict in (True, None):
        with pytest.raises(ValueError, match="parameters of 'f': they must have the type 'object'"):
            Followed().parameters(Declared("f", {"type": "string"}, strict))


def test_what_a_tagged_format_cannot_follow_is_refused_if_it_is_strict():
    cases = (
        ({"properties": {"a": {"type": "string", "format": "email"}}}, "cannot follow format of a text"),
        ({"properties": {"a b": {}}}, "cannot write an argument named 'a b'"),
        ({"properties": {f"p{i}": {} for i in range(65)}}, "has 65 arguments"),
        ({"properties": {}, "minProperties": 2}, "cannot follow minProperties of all arguments"),
    )
    for schema, message in cases:
        dialect("qwen_xml").grammar(AnswerRules([Declared("f", schema)], "auto", True))
        with pytest.raises(ValueError, match=f"'f' is strict, but .*{message}"):
            dialect("qwen_xml").grammar(AnswerRules([Declared("f", schema, True)], "auto", True))


@pytest.mark.parametrize("name", ["qwen_xml", "glm", "pythonic", "hermes"])
def test_arguments_of_any_names(compiler, name):
    for schema in ({}, {"type": "object"}, {"additionalProperties": True}):
        grammar = dialect(name).grammar(AnswerRules([Declared("f", schema)], "required", True))
        for given in ({}, {"x": 1, "y": "a"}):
            assert allows(compiler, grammar, WRITERS[name]([("f", given)], plain))
    closed = dialect(name).grammar(AnswerRules([Declared("f", None)], "required", True))
    assert not allows(compiler, closed, WRITERS[name]([("f", {"x": 1})], plain))


@pytest.mark.parametrize(
    ("schema", "kind"),
    [
        ({"type": "string"}, "text"),
        ({"enum": ["a", "b"]}, "text"),
        ({"$ref": "#/$defs/s"}, "text"),
        ({"allOf": [{"type": ["string", "null"]}, {"const": "x"}]}, "text"),
        ({"type": ["string", "null"]}, "either"),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "either"),
        ({"enum": ["a", None]}, "either"),
        ({}, "either"),
        (True, "either"),
        ({"$ref": "#/$defs/loop"}, "either"),
        ({"type": "integer"}, "json"),
        ({"type": ["number", "null"]}, "json"),
        ({"oneOf": [{"type": "boolean"}, {"type": "array"}]}, "json"),
    ],
)
def test_the_declared_types_decide_what_a_text_is(schema, kind):
    root = {"$defs": {"s": {"type": "string"}, "loop": {"$ref": "#/$defs/loop"}}}
    types = types_of(schema, root)
    assert kind_of(types) == kind
    if isinstance(schema, dict) and "loop" not in str(schema):
        validator = jsonschema.Draft202012Validator(root | schema)
        for value in ("x", "a", 1, 1.5, True, None, [], {}):
            assert type_of(value) in types or not validator.is_valid(value)


def test_calls_of_models_without_a_format(compiler):
    made, functions = JsonCall(), [Declared("look", UNIQUE), Declared("now", None)]
    required = made.grammar(AnswerRules(functions, "required", True))
    assert allows(compiler, required, '{"name": "look", "arguments": {"a": [1]}}')
    assert not allows(compiler, required, '{"name": "now", "arguments": {"a": [1]}}')
    named = made.grammar(AnswerRules(functions[:1], "named", True))
    assert allows(compiler, named, json.dumps({"a": [1]})) and "auto" not in made.choices
    assert made.marks == {} and len(made.new_id("look", 3)) == 9
