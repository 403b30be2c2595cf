"""Tests grammars of answers with calls: what they allow, what they refuse, and that random answers obey the
functions' schemas, by ``jsonschema``, and are read back."""

import json
import time

import jsonschema
import numpy as np
import pytest
from support.server.call_texts import FIRST, MARKERS, WRITERS, Declared, plain
from support.server.fake_engine import byte_tokenizer
from tokenizers import AddedToken

from jmoe.engine.grammar.check import GrammarChecker
from jmoe.engine.grammar.grammar import GrammarCompiler
from jmoe.server.dialects.dialect import format_dialect
from jmoe.server.dialects.events import Arguments, CallEnd, CallStart, PlainText
from jmoe.server.dialects.formats import FORMATS
from jmoe.server.dialects.rules import AnswerRules

HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|constrain|>", "<|call|>")
TEXT = {"type": "string"}
SCHEMAS = {
    "look": {
        "type": "object",
        "properties": {
            "city": TEXT,
            "days": {"type": "integer", "minimum": 0, "maximum": 9},
            "unit": {"type": "string", "enum": ["c", "f"]},
            "code": {"type": "string", "pattern": "^[a-z]{2,4}$"},
            "short": {"type": "string", "maxLength": 3},
        },
        "required": ["days", "city"],
        "additionalProperties": False,
    },
    "run": {
        "type": "object",
        "properties": {
            "env": {"$ref": "#/$defs/env"},
            "dry": {"type": "boolean"},
            "maybe": {"anyOf": [TEXT, {"type": "null"}]},
        },
        "required": ["env"],
        "additionalProperties": False,
        "$defs": {
            "env": {
                "type": "object",
                "properties": {"A": {"type": "array", "items": {"type": "number"}, "maxItems": 3}},
                "required": ["A"],
                "additionalProperties": False,
            }
        },
    },
    "now": {"type": "object", "properties": {}, "additionalProperties": False},
}
FUNCTIONS = [Declared(name, schema, strict=True) for name, schema in SCHEMAS.items()]
CASES = [
    [("look", {"city": 'São 😀 "q" </b>', "days": 3})],
    [("look", {"city": "", "days": 0, "unit": "f", "code": "abc", "short": "x\n"}), ("now", {})],
    [
        ("run", {"env": {"A": [1, 2.5]}, "dry": True, "maybe": "a b"}),
        ("run", {"env": {"A": []}, "maybe": None}),
    ],
    [("now", {})],
]
BAD = {
    "an unknown tool": ("rm", {}),
    "a wrong type": ("look", {"city": "", "days": "x"}),
    "a value beyond its bound": ("look", {"city": "", "days": 10}),
    "none of the enumerated": ("look", {"city": "", "days": 1, "unit": "k"}),
    "a text that misses its pattern": ("look", {"city": "", "days": 1, "code": "ab1"}),
    "a text that is too long": ("look", {"city": "", "days": 1, "short": "abcd"}),
    "a missing argument": ("look", {"city": "P"}),
    "an unknown argument": ("now", {"x": 1}),
}


class Model:
    """A tokenizer of bytes with the families' markers as tokens, or without, and its grammars."""

    def __init__(self, has_tokens):
        self.tokenizer = byte_tokenizer()
        markers = (*HARMONY, *MARKERS) if has_tokens else HARMONY
        self.tokenizer.add_tokens([AddedToken(m, special=m.startswith("[")) for m in markers])
        self.size = self.tokenizer.get_vocab_size()
        self.end = self.tokenizer.token_to_id("</s>")
        self.compiler = GrammarCompiler(self.tokenizer, self.size, [self.end])
        self.dialects = {n: format_dialect(form, self.tokenizer, self.size) for n, form in FORMATS.items()}

    def ids(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def text(self, name, ids):
        """Returns an answer's text as the engine's text layer writes it for a dialect."""
        marks, text, held = self.dialects[name].marks, "", b""
        for id in [*ids, None]:
            if id is not None and id < 256:
                held += bytes([id])
                continue
            text, held = text + held.decode(errors="replace"), b""
            text += marks.get(id, "" if id is None else self.tokenizer.id_to_token(id))
        return text

    def compiled(self, name, choice="auto", *, parallel=True, functions=FUNCTIONS):
        functions = functions[:1] if choice == "named" else functions
        made = self.dialects[name].grammar(AnswerRules(functions, choice, parallel))
        return self.compiler.compile(made)

    def allows(self, compiled, ids):
        matcher = compiled.matcher.deep_copy()
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    def calls(self, name, ids, functions=FUNCTIONS):
        """Returns the text and the calls that the dialect's reader finds."""
        reader = self.dialects[name].reader("auto", functions)
        text, calls = "", []
        for event in reader.feed(self.text(name, ids)) + reader.close():
            match event:
                case PlainText():
                    text += event.text
                case CallStart():
                    calls.append([event.name, "", False])
                case Arguments():
                    calls[-1][1] += event.text
                case CallEnd():
                    calls[-1][2] = True
        return text, calls


@pytest.fixture(scope="module", params=[False, True], ids=["text", "tokens"])
def model(request):
    return Model(request.param)


NAMES = sorted(WRITERS.keys() - {"harmony"})
# Llama's list of unknown functions is a text; a call behind a text is one too.
AS_TEXT = {("pythonic", "an unknown tool")}


@pytest.mark.parametrize("name", NAMES)
def test_what_a_family_writes_is_allowed(model, name):
    before = "" if name in FIRST else "I will look: 1 < 2.\n\n"
    for choice in ("auto", "required", "named"):
        for parallel in (True, False):
            compiled = model.compiled(name, choice, parallel=parallel)
            for calls in CASES:
                written = WRITERS[name](calls, plain)
                ids = model.ids((before if choice == "auto" else "") + written)
                is_one = len(calls) == 1
                allowed = is_one if choice == "named" or not parallel else True
                allowed &= choice != "named" or calls[0][0] == "look"
                if name in FIRST or choice != "auto" or parallel:
                    assert model.allows(compiled, ids) == allowed, (choice, parallel, calls)
                if allowed and choice == "auto":
                    found, made = model.calls(name, ids)
                    assert found == before
                    assert [(n, json.loads(a)) for n, a, _ in made] == calls
            assert model.allows(compiled, model.ids("No call é.")) == (choice == "auto")
            assert model.allows(compiled, []) == (choice == "auto")


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_without_parallel_calls_has_at_most_one(model, name):
    compiled = model.compiled(name, "auto", parallel=False)
    assert model.allows(compiled, model.ids(WRITERS[name](CASES[3], plain)))
    assert not model.allows(compiled, model.ids(WRITERS[name]([("now", {}), ("now", {})], plain)))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", NAMES)
def test_a_bad_call_is_refused(model, name, bad):
    ids = model.ids(WRITERS[name]([BAD[bad]], plain))
    for choice in ("auto", "required"):
        is_text = choice == "auto" and (name, bad) in AS_TEXT
        assert model.allows(model.compiled(name, choice), ids) == is_text


@pytest.mark.parametrize("name", NAMES)
def test_an_unfinished_call_and_a_bare_trigger_are_refused(model, name):
    compiled = model.compiled(name)
    written = WRITERS[name](CASES[0], plain)
    ids = model.ids(written)
    first = len(model.ids("[look(" if name == "pythonic" else FORMATS[name].trigger))
    for cut in range(first, len(ids)):
        whole = written.rstrip() == model.text("harmony", ids[:cut])
        assert whole or not model.allows(compiled, ids[:cut]), model.text(name, ids[:cut])
    if name not in FIRST:
        assert not model.allows(compiled, model.ids(f"The marker {FORMATS[name].trigger} begins a call."))


def walked(model, compiled, begin, rng, limit=500):
    """Returns a random answer that begins with ``begin``; None if it is too long. Ends of texts and numbers
    are likelier than their letters."""
    matcher, ids = compiled.matcher.deep_copy(), []
    ids = begin[: matcher.try_consume_tokens(begin)]
    likely = np.isin(np.arange(model.size), [*b'"</,}])\n', *range(256, model.size)])
    while len(ids) < limit:
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(mask, bitorder="little")[: model.size].astype(bool)
        if allowed[model.end]:
            return ids
        closing = allowed & likely
        choices = np.flatnonzero(closing if closing.any() and rng.random() < 0.4 else allowed)
        id = int(rng.choice(choices))
        matcher.consume_token(id)
        ids.append(id)
    return None


@pytest.mark.parametrize("name", NAMES)
def test_random_calls_obey_their_schemas_and_are_read_back(model, name):
    compiled, rng, num_calls = model.compiled(name), np.random.default_rng(5), 0
    form = FORMATS[name]
    for function in (*SCHEMAS, *SCHEMAS):
        named = form.named if form.is_at_start else ""
        ids = walked(model, compiled, model.ids(form.begin + form.opens + function + named), rng)
        if ids is None:
            continue
        text, calls = model.calls(name, ids)
        assert text == "" and calls and all(whole for _, _, whole in calls)
        for called, given, _ in calls:
            jsonschema.validate(json.loads(given), SCHEMAS[called])
            num_calls += 1
        canonical = WRITERS[name]([(n, json.loads(g)) for n, g, _ in calls], plain)
        again = model.calls(name, model.ids(canonical))[1]
        assert [json.loads(g) for _, g, _ in again] == [json.loads(g) for _, g, _ in calls]
    assert num_calls >= 2, "too few of the random answers ended"


def test_arguments_between_tags_come_in_any_order_each_once(model):
    compiled = model.compiled("qwen_xml")
    given = {"city": "x", "days": 1, "unit": "c", "short": "s"}
    for keys, allowed in ((("short", "days", "unit", "city"), True), (("unit", "city"), False)):
        text = WRITERS["qwen_xml"]([("look", {key: given[key] for key in keys})], plain)
        assert model.allows(compiled, model.ids(text)) == allowed
    one = "<parameter=days>\n1\n</parameter>\n"
    twice = WRITERS["qwen_xml"]([("look", given)], plain).replace(one, one + one)
    assert not model.allows(compiled, model.ids(twice))


def test_a_marker_that_is_a_token_is_no_text_of_an_argument():
    model = Model(True)
    text = WRITERS["hermes"]([("look", {"city": "<tool_call>", "days": 1})], plain)
    assert not model.allows(model.compiled("hermes"), model.ids(text))
    inside = text.index("<tool_call>", 5)
    spelled = [*model.ids(text[:inside]), *b"<tool_call>", *model.ids(text[inside + len("<tool_call>") :])]
    assert model.allows(model.compiled("hermes"), spelled)
    assert json.loads(model.calls("hermes", spelled)[1][0][1])["city"] == "<tool_call>"


def test_harmony(model):
    head = "<|channel|>analysis<|message|>Hm {.<|end|><|start|>assistant"
    call = "<|channel|>commentary to=functions.{} <|constrain|>json<|message|>{}"
    auto, required = model.compiled("harmony"), model.compiled("harmony", "required")
    for text, in_auto, in_required in (
        (head + call.format("now", "{}"), True, True),
        (call.format("look", '{"city": "P", "days": 2}'), True, True),
        (" to=functions.now<|channel|>commentary json<|message|>{}", True, True),
        (
            "<|channel|>commentary<|message|>So.<|end|><|start|>assistant" + call.format("now", "{}"),
            True,
            False,
        ),
        (head + "<|channel|>final<|message|>Hi é", True, False),
        (call.format("rm", "{}"), False, False),
        (call.format("now", '{"x": 1}'), False, False),
        (call.format("look", '{"city": "P"'), False, False),
        ("Hi", False, False),
    ):
        assert model.allows(auto, model.ids(text)) == in_auto, text
        assert model.allows(required, model.ids(text)) == in_required, text


def test_harmony_needs_its_tokens():
    tokenizer = byte_tokenizer()
    dialect = format_dialect(FORMATS["harmony"], tokenizer, tokenizer.get_vocab_size())
    with pytest.raises(ValueError, match=r"no token <\|start\|>, which calls in harmony need"):
        dialect.grammar(AnswerRules(FUNCTIONS, "auto", True))


# ---- costs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checker(model):
    checker = GrammarChecker(model.compiler.spec)
    yield checker
    checker.close()


@pytest.mark.parametrize("name", ["hermes", "qwen_xml", "pythonic"])
def test_two_hundred_tools_compile_in_bounded_time(model, checker, name):
    functions = [Declared(f"tool_{i}", {"type": "object", "properties": {f"a{i}": TEXT}}) for i in range(200)]
    begun = time.process_time()
    grammar = model.dialects[name].grammar(AnswerRules(functions, "auto", True))
    checker.check(model.compiler.source(grammar))
    assert time.process_time() - begun < 5
    text = WRITERS[name]([("tool_150", {"a150": "x"})], plain)
    compiled = model.compiler.compile(grammar)
    assert model.allows(compiled, model.ids(text))
    assert not model.allows(compiled, model.ids(text.replace("a150", "a15")))


def nested(depth):
    return {"type": "object", "properties": {"a": nested(depth - 1)} if depth else {}}


BOMBS = {
    "wide": {
        "type": "object",
        "properties": {f"p{i}": {"type": "string", "maxLength": 10**6} for i in range(1500)},
    },
    "deep": nested(400),
    "a long text": {"type": "object", "properties": {"a": {"enum": ["x" * 70_000]}}},
    "many branches": {
        "type": "object",
        "properties": {"a": {"anyOf": [{"pattern": f"^(a|b){{{i}}}$"} for i in range(900)]}},
    },
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("name", ["hermes", "qwen_xml"])
def test_a_schema_bomb_compiles_in_bounded_time_or_is_refused(model, checker, name, bomb):
    for strict in (True, None):
        function = Declared("bomb", BOMBS[bomb], strict)
        begun = time.process_time()
        try:
            grammar = model.dialects[name].grammar(AnswerRules([function], "auto", True))
            checker.check(model.compiler.source(grammar))
        except ValueError as error:
            assert "\n" not in str(error)
        assert time.process_time() - begun < 5
