"""Tests how tools and tool_choice determine the use of tools in an answer, and reads all dialects."""

import json

import msgspec
import pytest
from jmoe.server.request.dialects import DIALECTS, Arguments, CallEnd, CallStart, Dialect, PlainText

from jmoe.engine.request import Output
from jmoe.server.answer.calls import ToolFormat
from jmoe.server.answer.formats import ChoiceFields
from jmoe.server.errors import ApiError
from jmoe.server.request.checks import check_chat
from jmoe.server.request.decoding import decode
from jmoe.server.request.schema import ChatRequest, Function

TOOLS = [{"type": "function", "function": {"name": name, "strict": None}} for name in ("look", "stop")]
NAMED = {"type": "function", "function": {"name": "stop"}}


def checked(**fields):
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    return check_chat(decode(json.dumps(body).encode(), ChatRequest))


@pytest.mark.parametrize(
    ("choice", "names", "kind"), [("required", ["look", "stop"], "required"), (NAMED, ["stop"], "named")]
)
def test_a_call_is_of_the_functions_that_the_request_allows(choice, names, kind):
    chat = checked(tools=TOOLS, tool_choice=choice)
    assert chat.tools is not None and chat.grammar is not None
    assert [function.name for function in chat.tools.functions] == names
    assert chat.tools.choice == kind and chat.grammar.param == "tools"
    assert chat.tools.definitions == TOOLS, "the template sees all tools as they were sent"


@pytest.mark.parametrize("fields", [{}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}])
def test_without_a_call_the_answer_is_free(fields):
    chat = checked(**fields)
    assert chat.tools is None and chat.grammar is None


def test_a_checked_chat_cannot_change():
    with pytest.raises(AttributeError):
        checked().tools = None  # type: ignore[misc]


def test_two_grammars_are_refused():
    with pytest.raises(ApiError, match="tools both say what the answer must be") as refusal:
        checked(tools=TOOLS, tool_choice=NAMED, response_format={"type": "json_object"})
    assert msgspec.json.decode(refusal.value.response().body)["error"]["param"] == "tools"


# Answers that call the functions ``look`` and ``stop`` in every dialect, with their content.
ANSWERS = {
    ("json", "required"): (
        '{"name": "stop", "arguments": {"a": ["}\\\\\\"", {}]}}',
        [CallStart("stop"), Arguments('{"a": ["}\\\\\\"", {}]}'), CallEnd()],
    ),
    ("json", "named"): ("{ }", [CallStart("look"), Arguments("{ }"), CallEnd()]),
}


def joined(events):
    """Returns the events after neighbours of text, and of arguments, are joined."""
    made = []
    for event in events:
        if made and isinstance(event, PlainText | Arguments) and type(made[-1]) is type(event):
            event = type(event)(made.pop().text + event.text)
        made.append(event)
    return made


@pytest.mark.parametrize(("dialect", "choice"), [(d.name, c) for d in DIALECTS.values() for c in d.grammars])
def test_a_reader_finds_the_same_however_an_answer_is_cut(dialect, choice):
    text, events = ANSWERS[dialect, choice]
    functions = [msgspec.convert(tool["function"], Function) for tool in TOOLS]
    functions = functions[:1] if choice == "named" else functions
    for size in range(1, len(text) + 1):
        reader = DIALECTS[dialect].reader(choice, functions)
        found = [e for i in range(0, len(text), size) for e in reader.feed(text[i : i + size])]
        assert joined(found + reader.close()) == events


class Spelled:
    """A reader in which each piece of text means its events. It keeps the last events until it is closed."""

    def feed(self, text):
        return {"a": [PlainText("so "), PlainText("I ")],
                "b": [CallStart("look"), Arguments("{"), Arguments("}")],
                "c": [CallEnd(), CallStart("stop")], "d": [Arguments("{")]}.get(text, [])  # fmt: skip

    def close(self):
        return [Arguments("}"), CallEnd(), PlainText("!")]


def test_formats_write_the_events_of_any_dialect(monkeypatch):
    """Formats write any dialect's events: here one of the choice "auto", with text around several calls."""
    free = Dialect("free", {"auto": None}, lambda choice, functions: Spelled())
    monkeypatch.setattr("jmoe.server.request.tools.DIALECTS", {"free": free})
    chat = checked(tools=TOOLS, response_format={"type": "json_object"})
    assert chat.tools is not None and chat.tools.dialect is free
    assert chat.grammar is not None and chat.grammar.param == "response_format", "the dialect has no grammar"
    outputs = [Output("r", text=text) for text in "abcd"] + [Output("r", text="", finish_reason="stop")]
    form = ToolFormat(ChoiceFields(None, 1, None, has_token_ids=False), chat.tools)
    deltas = [msgspec.to_builtins(form.piece(0, output).delta) for output in outputs]
    assert [delta.get("content") for delta in deltas] == ["so I ", None, None, None, "!"]
    pieces = [[(c["index"], c["function"]) for c in delta.get("tool_calls", ())] for delta in deltas]
    assert pieces == [
        [],
        [(0, {"name": "look", "arguments": "{}"})],
        [(1, {"name": "stop", "arguments": ""})],
        [(1, {"arguments": "{"})],
        [(1, {"arguments": "}"})],
    ]
    whole = ToolFormat(form.fields, chat.tools).choice(0, [Output("r", text="b", finish_reason="stop")])
    assert whole.finish_reason == "tool_calls" and whole.message.content == "!"
    [call] = msgspec.to_builtins(whole.message)["tool_calls"]
    assert call["function"] == {"name": "look", "arguments": "{}}"}
