"""Tests how tools and tool_choice determine the use of tools in an answer, and formats of any dialect."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import msgspec
import pytest
from support.models.tokenizer_folders import byte_level, folder
from support.server.chat_models import call, calls, model, prompted, result
from support.server.chat_models import checked as checked_by
from support.server.fake_engine import ByteCodec

from jmoe.engine.request import Output
from jmoe.engine.text.codec import TextCodec
from jmoe.engine.text.markup import Markup
from jmoe.server.answer.calls import ToolFormat
from jmoe.server.answer.formats import ChoiceFields
from jmoe.server.dialects.events import Arguments, CallEnd, CallStart, Choice, PlainText
from jmoe.server.dialects.grammars.schemas import Followed
from jmoe.server.dialects.json_call import JsonCall
from jmoe.server.errors import ApiError
from jmoe.server.request.fields.chat import Function
from jmoe.server.request.params import chat_params
from jmoe.server.request.tools import ToolSupport

TOOLS = [{"type": "function", "function": {"name": name, "strict": None}} for name in ("look", "stop")]
NAMED = {"type": "function", "function": {"name": "stop"}}
USER = [{"role": "user", "content": "hi"}]


def allowed(mode: str, *names: str) -> dict:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.fixture(scope="module")
def hermes():
    return model("hermes", ByteCodec())


def checked(chat=None, messages=USER, **fields):
    return checked_by(chat or model("no_tools", ByteCodec()), messages, **fields)


@pytest.mark.parametrize(("choice", "names", "kind"), [
    (None, ["look", "stop"], "auto"), ("auto", ["look", "stop"], "auto"),
    ("required", ["look", "stop"], "required"),
    (NAMED, ["stop"], "named"), (allowed("auto", "stop"), ["stop"], "auto"),
    (allowed("required", "stop", "look"), ["look", "stop"], "required"),
])  # fmt: skip
def test_a_call_is_of_the_functions_that_the_request_allows(hermes, choice, names, kind):
    chat = checked(hermes, tools=TOOLS, tool_choice=choice)
    assert chat.tools is not None and chat.grammar is not None
    assert [function.name for function in chat.tools.functions] == names
    assert chat.tools.choice == kind and chat.grammar.param == "tools"
    assert chat.tools.definitions == TOOLS, "the template sees all tools as they were sent"
    assert chat.tools.dialect.name == "hermes"
    assert all((f'"{name}' in chat.grammar.grammar.text) == (name in names) for name in ("look", "stop"))


@pytest.mark.parametrize("fields", [{}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}])
def test_without_a_call_the_answer_is_free(hermes, fields):
    for chat in (checked(**fields), checked(hermes, **fields)):
        assert chat.tools is None and chat.grammar is None
    prompt = prompted(hermes, USER, **fields)
    assert "look" not in prompt.text and not prompt.markup.marks


@pytest.mark.parametrize(
    "choice", [{"type": "function", "function": {"name": "x"}}, allowed("auto", "look", "x")]
)
def test_a_choice_of_another_function_is_refused(hermes, choice):
    with pytest.raises(ApiError, match="tool_choice names 'x', which is none of the tools"):
        checked(hermes, tools=TOOLS, tool_choice=choice)


def test_one_call_at_most_if_the_request_wants_it(hermes):
    texts = []
    for each in (None, True, False):
        chat = checked(hermes, tools=TOOLS, tool_choice="required", parallel_tool_calls=each)
        assert chat.grammar is not None
        texts.append(chat.grammar.grammar.text)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(("name", "setting", "words"), [
    ("no_tools", "auto", "the template writes no calls in a known format"),
    ("hermes", "none", "tool_format is 'none'"),
    ("no_tools", "hermes", "the chat template does not show tools"),
])  # fmt: skip
def test_calls_in_free_text_are_refused_with_the_reason(name, setting, words):
    chat = model(name, ByteCodec(), setting)
    for choice in (None, "auto", allowed("auto", "look")):
        with pytest.raises(ApiError) as refusal:
            checked(chat, tools=TOOLS, tool_choice=choice)
        assert (refusal.value.status, refusal.value.param) == (400, "tool_choice")
        assert words in refusal.value.message and "'required'" in refusal.value.message
    for choice in ("required", NAMED):
        tools = checked(chat, tools=TOOLS, tool_choice=choice).tools
        assert tools is not None and tools.dialect.name == "json", "JSON is forced on any model"


def test_calls_are_counted_through_the_conversation():
    messages = [*USER, calls(call("a"), call("b", "stop")), result("a"), result("b")]
    tools = checked(model("kimi_k2", ByteCodec()), messages, tools=TOOLS).tools
    assert tools is not None and tools.num_calls == 2
    assert [tools.new_id("look", i) for i in range(2)] == ["functions.look:2", "functions.look:3"]


def test_marks_stand_for_the_tokens_of_calls_and_thoughts(tmp_path):
    tokenizer = byte_level("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>")
    size = tokenizer.get_vocab_size()
    chat = model("hermes", TextCodec(folder(tmp_path, tokenizer), size), vocab_size=size)
    ids = [tokenizer.token_to_id(text) for text in ("<think>", "</think>", "<tool_call>", "</tool_call>")]
    plain = prompted(chat, USER).markup
    assert plain.marks == {ids[0]: plain.thought_start, ids[1]: plain.thought_end}
    marked = prompted(chat, USER, tools=TOOLS).markup
    assert set(marked.marks) == set(ids) and len(set(marked.marks.values())) == 4
    assert all("\ue000" <= mark <= "\uf8ff" for mark in marked.marks.values())
    granite = prompted(model("granite", ByteCodec()), USER, tools=TOOLS).markup
    assert granite == Markup(call_start="<|tool_call|>"), "text of ordinary tokens needs no marks"


def test_the_model_s_turn_ends_hold_where_the_answer_is_free(hermes):
    for choice, stop in (("auto", ("END",)), ("required", ()), ("none", ("END",))):
        assert chat_params(checked(hermes, tools=TOOLS, tool_choice=choice), 258, ("END",)).stop == stop


def test_lengths_contradict_only_an_answer_whose_end_is_fixed(hermes):
    assert checked(hermes, tools=TOOLS, min_tokens=3, ignore_eos=True).tools is not None
    with pytest.raises(ApiError, match="min_tokens contradicts tools"):
        checked(hermes, tools=TOOLS, tool_choice="required", min_tokens=3)


def test_a_checked_chat_cannot_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        checked().tools = None  # type: ignore[misc]


def test_two_forms_of_the_text_are_refused():
    both = {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}
    with pytest.raises(ApiError, match="structured_outputs both say what the answer must be") as refusal:
        checked(**both)
    assert msgspec.json.decode(refusal.value.response().body)["error"]["param"] == "structured_outputs"


# Answers of models without a format that call the functions ``look`` and ``stop``, with their content.
ANSWERS = {
    "required": (
        '{"name": "stop", "arguments": {"a": ["}\\\\\\"", {}]}}',
        [CallStart("stop"), Arguments('{"a": ["}\\\\\\"", {}]}'), CallEnd()],
    ),
    "named": ("{ }", [CallStart("look"), Arguments("{ }"), CallEnd()]),
}


def joined(events):
    """Returns the events after neighbours of text, and of arguments, are joined."""
    made = []
    for event in events:
        if made and isinstance(event, PlainText | Arguments) and type(made[-1]) is type(event):
            event = type(event)(made.pop().text + event.text)
        made.append(event)
    return made


@pytest.mark.parametrize("choice", ANSWERS)
def test_a_reader_finds_the_same_however_an_answer_is_cut(choice):
    text, events = ANSWERS[choice]
    functions = [msgspec.convert(tool["function"], Function) for tool in TOOLS]
    functions = functions[:1] if choice == "named" else functions
    for size in range(1, len(text) + 1):
        reader = JsonCall().reader(choice, functions)
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


class Free:
    """A dialect whose answers follow no grammar."""

    name, choices = "free", frozenset[Choice](("auto",))
    marks: Mapping[int, str] = MappingProxyType({})
    followed, call_start = Followed(), ""

    def new_id(self, name, number):
        return name

    def grammar(self, rules):
        return None

    def around(self, answer):
        return answer

    def reader(self, choice, functions):
        return Spelled()


def test_formats_write_the_events_of_any_dialect(hermes):
    """Formats write any dialect's events: here one of the choice "auto", with text around several calls."""
    support = ToolSupport(Free(), "it is set", has_definitions=True)
    chat = checked(dataclasses.replace(hermes, tools=support), tools=TOOLS)
    assert chat.tools is not None and isinstance(chat.tools.dialect, Free) and chat.grammar is None
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
