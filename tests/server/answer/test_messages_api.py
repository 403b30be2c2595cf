"""Anthropic's Messages API: its answers, events, blocks and errors, over scripted answers."""

import json

import pytest
from support.server.answers import named_events
from support.server.scripted_engine import serving

PATH = "/v1/messages"
LOOK = {"name": "look", "input_schema": {"type": "object"}}
THINKS, CALLS = "<think>I think</think>\n\nHello", 'So:\n<call>look{"a": 1}</call>'
ASK = {"model": "fake", "max_tokens": 100, "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def serve(tmp_path, monkeypatch):
    yield from serving(tmp_path, monkeypatch)


def ask(client, **body):
    response = client.post(f"{PATH}?beta=true", json={**ASK, **body})
    assert response.status_code == 200, response.text
    return response.json()


def refused(response, status, kind):
    assert response.status_code == status, response.text
    assert set(response.json()) == {"type", "error"} and response.json()["type"] == "error"
    error = response.json()["error"]
    assert error["type"] == kind and set(error) == {"type", "message"}
    return error["message"]


@pytest.mark.parametrize("script", [THINKS, CALLS, "", CALLS + CALLS, "<think>only</think>"])
def test_a_stream_adds_up_to_the_whole_answer(serve, script):
    client = serve(script, script)
    whole = ask(client, tools=[LOOK])
    events = named_events(client.post(PATH, json={**ASK, "tools": [LOOK], "stream": True}))
    assert [e["type"] for e in events[:2]] == ["message_start", "ping"]
    message = events[0]["message"]
    assert (
        message["content"] == [] and message["stop_reason"] is None and message["usage"]["input_tokens"] == 7
    )
    blocks, is_open, text = [], False, ""
    for event in events[2:-2]:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks) and not is_open
            blocks.append(event["content_block"])
            is_open, text = True, ""
        elif event["type"] == "content_block_stop":
            assert event["index"] == len(blocks) - 1
            if blocks[-1]["type"] == "tool_use":
                assert blocks[-1]["input"] == {}
                blocks[-1]["input"] = json.loads(text)
            is_open = False
        else:
            [(field, value)] = [(k, v) for k, v in event["delta"].items() if k != "type"]
            if field == "partial_json":
                text += value
            else:
                blocks[-1][field] += value
    for made, expected in zip(blocks, whole["content"], strict=True):
        assert {k: v for k, v in made.items() if k != "id"} == {
            k: v for k, v in expected.items() if k != "id"
        }
    assert events[-2]["delta"] == {"stop_reason": whole["stop_reason"], "stop_sequence": None}
    assert events[-2]["usage"] == whole["usage"] and events[-1] == {"type": "message_stop"}
    assert whole["stop_reason"] == ("tool_use" if "call" in script else "end_turn")


def test_reasons_for_the_end(serve):
    client = serve("Hello, world", "Hello, world", '<call>look{"a": 1}</call>')
    cut = ask(client, stop_sequences=[", "])
    assert (cut["content"][0]["text"], cut["stop_reason"], cut["stop_sequence"]) == (
        "Hello",
        "stop_sequence",
        ", ",
    )
    short = ask(client, max_tokens=3)
    assert (short["content"][0]["text"], short["stop_reason"]) == ("Hel", "max_tokens")
    broken = ask(client, max_tokens=14, tools=[LOOK])
    assert broken["stop_reason"] == "max_tokens" and broken["content"][0]["input"] == {}


def test_a_limit_beyond_the_context_is_the_rest_of_it(serve):
    client = serve("Hello", "", max_model_len=64)
    ask(client, max_tokens=32000)
    assert client.service.engine.seen[-1].params.max_tokens == 64 - 7
    long = client.post(PATH, json={**ASK, "messages": [{"role": "user", "content": "x" * 80}]})
    assert refused(long, 400, "invalid_request_error").startswith("prompt is too long")


def test_blocks_become_messages(serve):
    client = serve("ok")
    ask(
        client,
        system=[
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=1"},
            {"type": "text", "text": "Help.", "cache_control": {"type": "ephemeral"}},
        ],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "system", "content": "later"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "t", "signature": "am1vZQ=="},
                    {"type": "redacted_thinking", "data": "x"},
                    {"type": "text", "text": "So"},
                    {"type": "tool_use", "id": "1", "name": "look", "input": {"a": 1}},
                    {"type": "tool_use", "id": "2", "name": "look", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "one"}]},
                    {"type": "tool_result", "tool_use_id": "2", "is_error": True},
                    {"type": "text", "text": "and?"},
                ],
            },
        ],
    )
    assert client.service.engine.prompt() == (
        's:Help.\nu:a|b\ns:later\na:(t)So[look {"a": 1}][look {}]\nt:one\nt:\nu:and?\na:'
    )


@pytest.mark.parametrize(
    ("choice", "kind"),
    [
        (None, "auto"),
        ({"type": "any"}, "required"),
        ({"type": "tool", "name": "look"}, "named"),
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto"),
    ],
)
def test_tool_choices(serve, choice, kind):
    client = serve("Hello")
    ask(client, tools=[LOOK, {"type": "web_search_20250305", "name": "web_search"}], tool_choice=choice)
    use = client.uses[-1]
    assert use.choice == kind and [f.name for f in use.functions] == ["look"]
    assert (use.body.parallel_tool_calls is False) == bool(choice and "disable_parallel_tool_use" in choice)


def test_thinking_and_effort_reach_the_template(serve, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "jmoe.server.routes.generate.check_chat", lambda body, support: seen.append(body) or 1 / 0
    )
    client = serve()
    for thinking in ("enabled", "adaptive", "disabled"):
        client.post(PATH, json={**ASK, "thinking": {"type": thinking}, "output_config": {"effort": "low"}})
    assert [body.enable_thinking for body in seen] == [True, True, False]
    assert {body.reasoning_effort for body in seen} == {"low"}


def test_an_answer_may_have_a_form(serve):
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    answer = ask(serve('{"a": 1}'), output_config={"format": {"type": "json_schema", "schema": schema}})
    assert json.loads(answer["content"][0]["text"]) == {"a": 1}


def test_failures_have_this_apis_shape(serve):
    events = named_events(serve("Hello", fails_at=3).post(PATH, json={**ASK, "stream": True}))
    assert events[-1]["type"] == "error" and events[-1]["error"]["type"] == "api_error"
    refused(serve("Hello", fails_at=3).post(PATH, json=ASK), 500, "api_error")
    client = serve("Hello", settings={"api_key": "secret", "max_body_bytes": 500})
    refused(client.post(PATH, json=ASK), 401, "authentication_error")
    key = {"x-api-key": "secret"}
    refused(client.post(PATH, json={**ASK, "model": "other"}, headers=key), 404, "not_found_error")
    refused(client.post(f"{PATH}/batches", json={}, headers=key), 404, "not_found_error")
    refused(client.post(PATH, json={**ASK, "system": "x" * 600}, headers=key), 413, "request_too_large")
    refused(client.get(PATH, headers=key), 405, "invalid_request_error")
    client.service.is_draining = True
    refused(client.post(PATH, json=ASK, headers=key), 503, "overloaded_error")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages[0].content[0] has type 'image'",
        ),
        ({"messages": []}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"tools": [{"name": "x"}]}, "tools[0].input_schema is required"),
        ({"tools": [LOOK], "tool_choice": {"type": "tool"}}, "tool_choice.name is required"),
        (
            {
                "tools": [{"type": "bash_20250124", "name": "bash"}],
                "tool_choice": {"type": "tool", "name": "bash"},
            },
            "a tool that this server does not run",
        ),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}},
            "output_config.format",
        ),
    ],
)
def test_refusals_name_the_field(serve, body, words):
    assert words in refused(serve().post(PATH, json={**ASK, **body}), 400, "invalid_request_error")


def test_a_key_may_come_in_either_header(serve):
    client = serve("a", "b", "c", settings={"api_key": "secret"})
    for headers in (
        {"x-api-key": "secret"},
        {"authorization": "Bearer secret"},
        {"x-api-key": "secret", "authorization": "Bearer other"},
    ):
        assert client.post(PATH, json=ASK, headers=headers).status_code == 200
    for headers in ({"x-api-key": "other"}, {"x-api-key": ""}, {"authorization": "secret"}):
        assert client.get("/v1/models", headers=headers).status_code == 401


def test_tokens_are_counted(serve):
    body = {"messages": ASK["messages"], "system": "x", "tools": [LOOK]}
    assert serve().post(f"{PATH}/count_tokens", json=body).json() == {"input_tokens": len("s:x\nu:hi\na:")}
