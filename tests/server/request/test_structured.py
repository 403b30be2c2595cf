"""Tests structured answers and function calls over HTTP. The fake engine obeys the real constraints."""

import json
import re
from typing import Literal

import openai
import pydantic
import pytest
from support.server.answers import UNSUPPORTED, VALUE, check, events
from support.server.fake_engine import ByteCodec, FakeEngine, listening, served

from jmoe.server.request.conversation.chat_model import chat_model
from jmoe.server.template.chat_template import ChatTemplate

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 1, "maximum": 40}, "s": {"enum": ['}"\\', "{"]}},
    "required": ["a", "s"],
    "additionalProperties": False,
}
TEMPLATE = (
    "{% if tools %}tools:{{ tools | tojson }}\n{% endif %}{% if mood %}mood:{{ mood }}\n{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}={{ c.function.arguments['x'] }}{% endfor %}{{ m.tool_call_id }}\n{% endfor %}"
)


def tool(name, parameters=None, strict=None):
    given = {"parameters": parameters, "strict": strict}
    function = {"name": name} | {field: value for field, value in given.items() if value is not None}
    return {"type": "function", "function": function}


def named(name):
    return {"type": "function", "function": {"name": name}}


TOOLS = [tool("look", SCHEMA), tool("stop")]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    (directory / "generation_config.json").write_text('{"stop_strings": ["\\n"]}')
    with served(FakeEngine(ByteCodec(), max_model_len=2048), directory=directory) as client:
        yield client


def ask(client, path=CHAT, **body):
    prompt = {"messages": USER} if path == CHAT else {"prompt": "hi", "max_tokens": 400}
    response = client.post(path, json={**prompt, **body})
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def text_of(choice):
    return choice["text"] if "text" in choice else choice["message"]["content"]


SCHEMA_FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("field", [
    {"response_format": SCHEMA_FORMAT},
    {"structured_outputs": {"json": SCHEMA, "regex": None, "json_object": False}},
    {"structured_outputs": {"json": json.dumps(SCHEMA)}},
])  # fmt: skip
def test_a_schema_is_followed(client, path, field):
    (choice,) = ask(client, path, **field)
    assert json.loads(text_of(choice)) == {"a": 1, "s": "{"} and choice["finish_reason"] == "stop"
    if path == CHAT:
        assert "\n" in text_of(choice), "a string that ends turns does not end a JSON text"


@pytest.mark.parametrize(("outputs", "answer"), [
    ({"regex": "[b-d]{2}h?"}, "bbh"),
    ({"choice": ["yes", "no\n"]}, "no\n"),
    ({"grammar": 'start: "x" (pair)\npair: "[" "y" "]"'}, "x[y]"),
])  # fmt: skip
def test_other_grammars_are_followed(client, outputs, answer):
    (choice,) = ask(client, TEXT, structured_outputs=outputs)
    assert (choice["text"], choice["finish_reason"]) == (answer, "stop")


def test_any_object(client):
    for field in (
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"json_object": True}},
    ):
        (choice,) = ask(client, **field, max_tokens=1)
        assert (text_of(choice), choice["finish_reason"]) == ("{", "length")


def test_every_choice_has_a_matcher_of_its_own(client):
    outputs = {"choice": ["h", "n"]}
    choices = ask(
        client, TEXT, prompt=["hi", "no"], n=2, add_special_tokens=False, structured_outputs=outputs
    )
    assert [c["text"] for c in choices] == ["h", "h", "n", "n"]


def test_equal_grammars_are_compiled_once(client):
    kept = client.service.grammars.cache
    ask(client, TEXT, structured_outputs={"regex": "once"})
    compiled = next(reversed(kept.values()))
    ask(client, TEXT, structured_outputs={"regex": "other"})
    ask(client, TEXT, structured_outputs={"regex": "once"})
    assert next(reversed(kept.values())) is compiled
    for i in range(70):
        ask(client, TEXT, structured_outputs={"regex": f"x{i}"})
    assert len(kept) == 64 and compiled not in kept.values()


def test_required_tools_are_called(client):
    (choice,) = ask(client, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert re.fullmatch("[A-Za-z0-9]{9}", call["id"]) and call["type"] == "function"
    assert call["function"]["name"] == "look"
    assert json.loads(call["function"]["arguments"]) == {"a": 1, "s": "{"}


def test_a_named_tool_gets_its_arguments_alone(client):
    for name, arguments in (("look", {"a": 1, "s": "{"}), ("stop", {})):
        (choice,) = ask(client, tools=TOOLS, tool_choice=named(name))
        (call,) = choice["message"]["tool_calls"]
        assert (choice["finish_reason"], call["function"]["name"]) == ("stop", name)
        assert json.loads(call["function"]["arguments"]) == arguments


@pytest.mark.parametrize("choice", ["required", named("look")])
@pytest.mark.parametrize("n", [1, 2])
def test_streamed_calls_add_up(client, choice, n):
    body = {"messages": USER, "tools": TOOLS, "tool_choice": choice, "n": n}
    whole = client.post(CHAT, json=body).json()["choices"]
    chunks = [c["choices"][0] for c in events(client.post(CHAT, json={**body, "stream": True}))]
    for i in range(n):
        mine = [c for c in chunks if c["index"] == i]
        assert mine[0]["delta"] == {"role": "assistant", "content": None}
        pieces = [p for c in mine for p in c["delta"].get("tool_calls", ())]
        assert {p["index"] for p in pieces} == {0}
        assert re.fullmatch("[A-Za-z0-9]{9}", pieces[0]["id"]) and pieces[0]["type"] == "function"
        assert all(
            set(p) == {"index", "function"} and set(p["function"]) == {"arguments"} for p in pieces[1:]
        )
        called = whole[i]["message"]["tool_calls"][0]["function"]
        text = "".join(p["function"]["arguments"] for p in pieces)
        assert (pieces[0]["function"]["name"], text) == (called["name"], called["arguments"])
        assert mine[-1]["finish_reason"] == whole[i]["finish_reason"]


def test_a_call_that_is_cut_off_says_so(client):
    (choice,) = ask(client, tools=TOOLS, tool_choice="required", max_tokens=8)
    assert choice["message"] == {"role": "assistant", "content": None, "refusal": None}
    assert choice["finish_reason"] == "length"
    (choice,) = ask(client, tools=TOOLS, tool_choice="required", max_tokens=34)
    assert choice["finish_reason"] == "length" and choice["message"]["tool_calls"][0]["function"]["arguments"]
    (choice,) = ask(client, tools=TOOLS, tool_choice="required", stop='"a"')
    assert choice["finish_reason"] == "stop", "no call was finished"


def prompt_of(client):
    return bytes(t for t in client.service.engine.seen[-1].prompt_token_ids if t < 256).decode()


def test_the_template_sees_tools_calls_and_variables(client):
    messages = [*USER, {"role": "assistant", "content": None, "annotations": None, "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"x": 7}'}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "found"}]  # fmt: skip
    ask(client, messages=messages, tools=TOOLS[1:], tool_choice="required",
        chat_template_kwargs={"mood": "calm"}, max_tokens=1)  # fmt: skip
    shown = json.dumps([{"type": "function", "function": {"name": "stop"}}])
    assert prompt_of(client) == f"tools:{shown}\nmood:calm\nuser:hi\nassistant:look=7\ntool:foundc1\n"
    ask(client, tools=TOOLS, tool_choice="none", max_tokens=1)
    assert prompt_of(client) == "user:hi\n", "tools that shall not be called are not shown"


def test_other_parameters_reach_the_engine(client):
    ask(client, TEXT, max_tokens=1, min_p=0.25, logit_bias={"5": -100, "97": 1.5}, cache_salt="s", priority=0,
        add_special_tokens=False)  # fmt: skip
    request = client.service.engine.seen[-1]
    assert request.prompt_token_ids == list(b"hi") and request.constraint is None
    assert (request.params.min_p, request.params.cache_salt) == (0.25, "s")
    assert request.params.logit_bias == ((5, -100.0), (97, 1.5))
    ask(client, add_special_tokens=True, max_tokens=1)
    assert client.service.engine.seen[-1].prompt_token_ids[0] == 256


REGEX = {"regex": "a"}
BAD = [
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
     "response_format.json_schema.schema", "missing_required_parameter"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "?"}}}},
     "response_format", VALUE),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
     "response_format.json_schema.name", VALUE),
    ({"response_format": {"type": "json_object", "schema": {}}},
     "response_format.schema", "unknown_parameter"),
    ({"structured_outputs": {}}, "structured_outputs", VALUE),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", VALUE),
    ({"structured_outputs": {"regex": "a(b"}}, "structured_outputs", VALUE),
    ({"structured_outputs": {"regex": "a" * 65537}}, "structured_outputs.regex", VALUE),
    ({"structured_outputs": {"json": {"enum": ["a" * 66000]}}}, "structured_outputs", VALUE),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs", VALUE),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", VALUE),
    ({"structured_outputs": {"guided": "a"}}, "structured_outputs.guided", "unknown_parameter"),
    ({"guided_regex": "a"}, "guided_regex", "unknown_parameter"),
    ({"structured_outputs": REGEX, "response_format": {"type": "json_object"}}, "structured_outputs", VALUE),
    ({"structured_outputs": REGEX, "ignore_eos": True}, "ignore_eos", VALUE),
    ({"structured_outputs": REGEX, "min_tokens": 1, "max_tokens": 2}, "min_tokens", VALUE),
    ({"tools": TOOLS}, "tool_choice", UNSUPPORTED),
    ({"tools": TOOLS, "tool_choice": "auto"}, "tool_choice", UNSUPPORTED),
    ({"tool_choice": "required"}, "tool_choice", VALUE),
    ({"tools": [], "tool_choice": "required"}, "tool_choice", VALUE),
    ({"tools": [tool("f\n")], "tool_choice": "required"}, "tools[0].function.name", VALUE),
    ({"tool_choice": named("look")}, "tool_choice", VALUE),
    ({"tools": TOOLS, "tool_choice": named("other")}, "tool_choice", VALUE),
    ({"tools": [*TOOLS, TOOLS[0]], "tool_choice": "required"}, "tools", VALUE),
    ({"tools": [tool("f", {"type": "string"})], "tool_choice": "required"}, "tools", VALUE),
    ({"tools": [tool("f", {"type": "object", "not": {}}, True)], "tool_choice": named("f")}, "tools", VALUE),
    ({"tools": [{"type": "search"}], "tool_choice": "required"}, "tools[0].type", VALUE),
    ({"tools": [{"type": "function"}], "tool_choice": "required"}, "tools[0].function",
     "missing_required_parameter"),
    *(({"tools": [tool(name)], "tool_choice": "required"}, "tools[0].function.name", VALUE)
      for name in ("a b", "f\n", "\nf", "f\r", "f\u2028", "f\x85", "\u0661", "")),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x\n", "schema": {}}}},
     "response_format.json_schema.name", VALUE),
]  # fmt: skip


def test_a_schema_that_cannot_be_followed_is_any_object_unless_it_is_strict(client):
    wrong = {"type": "object", "properties": {"a": {"type": "arr"}}}
    for strict, status in ((None, 200), (False, 200), (True, 400)):
        tools = [tool("f", wrong, strict), tool("g", {"type": "object", "uniqueItems": True})]
        body = {"messages": USER, "max_tokens": 2, "tools": tools, "tool_choice": "required"}
        response = client.post(CHAT, json=body)
        assert response.status_code == status, response.text
    assert "the parameters of 'f': " in check(response, 400, "tools", VALUE)


@pytest.mark.parametrize(("change", "param", "code"), BAD)
def test_bad_structure(client, change, param, code):
    message = check(client.post(CHAT, json={"messages": USER, "max_tokens": 2, **change}), 400, param, code)
    assert "\n" not in message and len(message) < 500
    assert not client.service.generations


def test_a_hostile_schema_is_a_400(client):
    """A hostile schema, which would exhaust the stack of its compiler, gets a 400."""
    links = {f"r{i}": {"properties": {"a": {"$ref": f"#/$defs/r{i + 1}"}}} for i in range(1000)}
    schema = {"$ref": "#/$defs/r0", "$defs": links | {"r1000": {"type": "string"}}}
    response = client.post(TEXT, json={"prompt": "a", "structured_outputs": {"json": schema}})
    assert "too complex" in check(response, 400, "structured_outputs", VALUE)
    assert ask(client, TEXT, structured_outputs={"regex": "after"})[0]["text"] == "after"


def test_too_many_waiting_grammars_are_a_503(client, monkeypatch):
    monkeypatch.setattr("jmoe.server.request.grammars.MAX_WAITING", 0)
    response = client.post(TEXT, json={"prompt": "a", "structured_outputs": {"regex": "unseen"}})
    check(response, 503, None, "grammar_queue_full")
    assert response.headers["retry-after"] == "1"


def test_auto_says_what_to_do(client):
    text = client.post(CHAT, json={"messages": USER, "tools": TOOLS}).json()["error"]["message"]
    assert all(word in text for word in ("'required'", "a named function", "'none'"))


class Pick(pydantic.BaseModel):
    mood: Literal["calm", "loud"]
    sure: bool


def test_the_openai_client_gets_what_it_parses():
    """The openai client gets what it parses: its schemas, whole and streamed answers, returned messages."""
    with listening(FakeEngine(ByteCodec(), max_model_len=2048)) as (url, server):
        server.service.chat = chat_model(ChatTemplate(TEMPLATE, {}), server.service.facts, "auto")
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="EMPTY", max_retries=0)
        chat, tools = client.chat.completions, [openai.pydantic_function_tool(Pick)]
        ask = {"model": "fake", "messages": USER}
        parsed = chat.parse(**ask, response_format=Pick).choices[0].message.parsed
        assert isinstance(parsed, Pick)
        with chat.stream(**ask, tools=tools, tool_choice="required") as stream:
            final = stream.get_final_completion().choices[0]
        assert final.finish_reason == "tool_calls"
        assert isinstance(final.message.tool_calls[0].function.parsed_arguments, Pick)
        called = chat.create(**ask, tools=tools, tool_choice=named("Pick")).choices[0].message
        result = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "done"}
        for message in (called, called.model_dump()):
            assert chat.create(model="fake", messages=[*USER, message, result], max_tokens=3).choices


def test_without_a_tokenizer_or_an_end():
    body = {"prompt": [97], "structured_outputs": REGEX}
    with served(FakeEngine()) as client:
        assert "no tokenizer" in check(client.post(TEXT, json=body), 400, "structured_outputs", VALUE)
    with served(FakeEngine(ByteCodec(), end_ids=frozenset())) as client:
        assert "end-of-text" in check(client.post(TEXT, json=body), 400, "structured_outputs", VALUE)


def test_a_matcher_that_fails_ends_its_request_alone(client):
    """A matcher that fails ends only its own request.

    The grammar has more ways to continue than llguidance follows, but only after so many tokens that no trial
    sees it. The request is at fault, because another try would fail too.
    """
    many = " | ".join(f'"{i}" b' for i in range(3000))
    outputs = {"grammar": f'start: /[ac]{{20}}/ b ({many})\nb: "b"'}
    body = {"prompt": "a", "max_tokens": 40, "structured_outputs": outputs}
    message = check(client.post(TEXT, json=body), 400, "structured_outputs", VALUE)
    assert "the grammar failed" in message and not client.service.generations
    *parts, last = events(client.post(TEXT, json={**body, "stream": True}))
    assert "".join(p["choices"][0]["text"] for p in parts) == "a" * 20
    assert (last["error"]["type"], last["error"]["param"]) == ("invalid_request_error", "structured_outputs")
    assert ask(client, TEXT, structured_outputs=REGEX)[0]["text"] == "a"
