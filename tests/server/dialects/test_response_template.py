"""Tests the reading of a checkpoint's ``response_template``, against transformers' own parser."""

import json

import pytest
from support.server.call_texts import MARKERS, WRITERS, plain

from jmoe.server.dialects.events import Arguments, CallEnd, CallStart, PlainText
from jmoe.server.dialects.formats import FORMATS
from jmoe.server.dialects.response_template import ResponseTemplate, written
from jmoe.server.dialects.rules import AnswerRules
from jmoe.server.dialects.template_dialect import TemplateDialect

CALLS = [("look", {"city": 'a "b" <c>', "days": 3}), ("now", {})]
FUNCTION = {"type": "function", "function": "{content}"}
NAMED = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
FIELDS = {
    "hermes": {
        "open": "<tool_call>\n", "close": "\n</tool_call>", "repeats": True, "content": "json",
        "transform": FUNCTION,
    },
    "qwen_xml": {
        "open_pattern": r"<tool_call>\n<function=(?P<name>[^>]+)>\n",
        "close": "</function>\n</tool_call>",
        "repeats": True,
        "content": "xml-inline",
        "content_args": {
            "tag_pattern": r"<parameter=(?P<key>[^>]+)>\n(?P<value>.*?)\n</parameter>\n",
            "value_parser": {"name": "json", "args": {"allow_non_json": True}},
        },
        "transform": NAMED,
    },
    "deepseek_v31": {
        "open_pattern": "(?:<｜tool▁calls▁begin｜>)?<｜tool▁call▁begin｜>(?P<name>[^<]+)<｜tool▁sep｜>",
        "close_pattern": "<｜tool▁call▁end｜>(?:<｜tool▁calls▁end｜>)?",
        "repeats": True,
        "content": "json",
        "transform": NAMED,
    },
    "granite": {
        "open": "<|tool_call|>", "content": "json", "transform_each": True,
        "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}},
    },
}  # fmt: skip


def template(field):
    return {"version": 1, "start_anchor": "<|assistant|>", "fields": {"tool_calls": field, "content": {}}}


@pytest.mark.parametrize("name", FIELDS)
def test_a_template_finds_its_format(name):
    assert ResponseTemplate(template(FIELDS[name])).matching(FORMATS.values()) == FORMATS[name]


@pytest.mark.parametrize("name", FORMATS)
def test_the_probe_is_what_a_family_writes(name):
    assert written(FORMATS[name], CALLS) == WRITERS[name](CALLS, plain)


@pytest.mark.parametrize("name", FIELDS)
def test_an_answer_is_read_whole(name):
    answer = "So:" + WRITERS[name](CALLS, plain)
    reader = TemplateDialect(ResponseTemplate(template(FIELDS[name])), {}).reader("auto", [])
    assert [reader.feed(answer[i : i + 7]) for i in range(0, len(answer), 7)] == [[]] * -(-len(answer) // 7)
    text, *events = reader.close()
    assert text == PlainText("So:") and [type(e) for e in events] == [CallStart, Arguments, CallEnd] * 2
    assert [(e.name, json.loads(a.text)) for e, a in zip(events[::3], events[1::3], strict=True)] == CALLS


@pytest.mark.parametrize("name", FIELDS)
def test_markers_that_are_tokens_reach_the_template(name):
    tokens = {marker: 300 + i for i, marker in enumerate(MARKERS)}
    made = TemplateDialect(ResponseTemplate(template(FIELDS[name])), tokens)
    assert made.grammar(AnswerRules([], "auto", True)) is None and made.marks
    marks = {marker: made.marks.get(id, marker) for marker, id in tokens.items()}
    reader = made.reader("auto", [])
    events = reader.feed(WRITERS[name](CALLS, marks.__getitem__)) + reader.close()
    assert [e.name for e in events if isinstance(e, CallStart)] == [called for called, _ in CALLS]
    reader = made.reader("auto", [])
    assert reader.feed(f"a{next(iter(made.marks.values()))}") + reader.close() == [PlainText("a")]


@pytest.mark.parity
@pytest.mark.parametrize("name", FIELDS)
def test_transformers_reads_the_same_calls(name):
    parsing = pytest.importorskip("transformers.utils.chat_parsing")
    answer = "So:" + WRITERS[name](CALLS, plain)
    theirs = parsing.parse_response(answer, template(FIELDS[name]), prefix="")
    assert [(c["function"]["name"], c["function"]["arguments"]) for c in theirs["tool_calls"]] == CALLS


def test_text_without_calls_and_calls_that_cannot_be_read_are_text():
    made = ResponseTemplate(template(FIELDS["hermes"]))
    for answer in ("Hi \n", "<tool_call>\n{nothing}\n</tool_call>", "<tool_call>\n3\n</tool_call>"):
        reader = TemplateDialect(made, {}).reader("auto", [])
        assert reader.feed(answer) + reader.close() == [PlainText(answer)]


def test_a_template_of_a_form_that_no_format_has():
    field = FIELDS["hermes"] | {"open": "<call>", "close": "</call>"}
    assert ResponseTemplate(template(field)).matching(FORMATS.values()) is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"version": 2}, "version 2 is not 1"),
        ({"fields": {"content": {}}}, "it has no field tool_calls"),
        (
            template({"open": "<c>", "content": "kv-lines"}),
            "content 'kv-lines' is none of json, xml-inline, text",
        ),
        (template({"content": "json"}), "tool_calls has neither open nor open_pattern"),
        (template({"open_pattern": "("}), "open_pattern of tool_calls: missing"),
    ],
)
def test_a_template_that_is_not_read(spec, message):
    with pytest.raises(ValueError, match=message):
        ResponseTemplate(spec)
