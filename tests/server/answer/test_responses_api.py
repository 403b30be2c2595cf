"""The Responses API: its answers, events, tools, state and refusals, over scripted answers."""

import json
import logging

import pytest
from support.server.answers import check, named_events
from support.server.scripted_engine import serving

from jmoe.server.answer.responses.custom_input import InputReader
from jmoe.server.answer.responses.replies import ResponseReply
from jmoe.server.answer.responses.store import ResponseStore

PATH = "/v1/responses"
LOOK = {"type": "function", "name": "look", "parameters": {"type": "object"}}
THINKS, CALLS = "<think>I think</think>\n\nHello", 'So:\n<call>look{"a": 1}</call>'


@pytest.fixture
def serve(tmp_path, monkeypatch):
    yield from serving(tmp_path, monkeypatch)


def ask(client, **body):
    response = client.post(PATH, json={"input": "hi", **body})
    assert response.status_code == 200, response.text
    return response.json()


def plain(value):
    """Returns the value without ids and times, which differ in each answer."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in ("id", "created_at", "call_id")}
    return [plain(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("script", [THINKS, CALLS, "", " ", CALLS + CALLS, "<think>only</think>"])
def test_a_stream_adds_up_to_the_whole_answer(serve, script):
    client = serve(script, script)
    body = {"input": "hi", "tools": [LOOK], "reasoning": {"summary": "auto"}}
    whole = ask(client, **body)
    events = named_events(client.post(PATH, json={**body, "stream": True}))
    assert [e["sequence_number"] for e in events] == [*range(len(events))]
    assert [e["type"] for e in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0]["response"]["output"] == [] and events[0]["response"]["status"] == "in_progress"
    assert events[-1]["type"] == "response.completed"
    assert plain(events[-1]["response"]) == plain(whole)
    items = [e["item"] for e in events if e["type"] == "response.output_item.done"]
    assert items == events[-1]["response"]["output"] and items
    for i, item in enumerate(items):
        own = [e for e in events if e.get("item_id") == item["id"]]
        assert {e["output_index"] for e in own} == {i}
        begun = next(
            e["item"] for e in events if e["type"] == "response.output_item.added" and e["output_index"] == i
        )
        assert begun["status"] == "in_progress" and not begun.get("content") and not begun.get("arguments")
        text = "".join(e["delta"] for e in own if "delta" in e and "summary" not in e["type"])
        assert text == (item["arguments"] if "arguments" in item else item["content"][0]["text"])
        assert [e["type"].rsplit(".")[-1] for e in own[-1:]] == ["done"]
        if item["type"] == "reasoning":
            assert item["summary"] == [{"type": "summary_text", "text": text}]


def test_the_usage_counts_thoughts(serve):
    usage = ask(serve(THINKS))["usage"]
    assert (
        usage["output_tokens"] == len(THINKS) + 1
        and 0 < usage["output_tokens_details"]["reasoning_tokens"] < 20
    )
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


@pytest.mark.parametrize("script", ["Hello", '<call>look{"a": 1}</call>'])
def test_a_cut_answer_is_incomplete(serve, script):
    client = serve(script, script)
    whole = ask(client, tools=[LOOK], max_output_tokens=len(script) - 3 if "<" not in script else 14)
    assert whole["status"] == "incomplete" and whole["output"][-1]["status"] == "incomplete"
    assert whole["incomplete_details"] == {"reason": "max_output_tokens"}
    events = named_events(client.post(PATH, json={"input": "hi", "stream": True, "max_output_tokens": 2}))
    assert events[-1]["type"] == "response.incomplete"


def test_a_limit_beyond_the_context_is_the_rest_of_it(serve):
    client = serve("Hello", "", max_model_len=64)
    assert ask(client, max_output_tokens=32000)["status"] == "completed"
    assert client.service.engine.seen[-1].params.max_tokens == 64 - len("u:hi\na:")
    answer = client.post(PATH, json={"input": "x" * 80})
    check(answer, 400, "input", "context_length_exceeded")


def test_a_failure_after_the_start_is_an_event(serve):
    events = named_events(serve("Hello", fails_at=3).post(PATH, json={"input": "hi", "stream": True}))
    assert events[-1]["type"] == "response.failed" and "NaN" in events[-1]["response"]["error"]["message"]
    check(serve("Hello", fails_at=3).post(PATH, json={"input": "hi"}), 500, None, None)


def test_items_of_one_turn_are_one_message(serve):
    client = serve("ok")
    ask(
        client,
        instructions="Help.",
        input=[
            {"role": "developer", "content": "dev"},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {
                "type": "reasoning",
                "id": "rs_0",
                "summary": [],
                "content": [{"type": "reasoning_text", "text": "t"}],
                "encrypted_content": None,
            },
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "So", "annotations": []}],
            },
            {"type": "function_call", "call_id": "1", "name": "look", "arguments": '{"a": 1}'},
            {"type": "function_call", "call_id": "2", "name": "f", "namespace": "ns", "arguments": "{}"},
            {"type": "custom_tool_call", "call_id": "3", "name": "run", "input": 'x"y'},
            {"type": "function_call_output", "call_id": "1", "output": "one"},
            {
                "type": "function_call_output",
                "call_id": "2",
                "output": [{"type": "input_text", "text": "two"}],
            },
            {"type": "custom_tool_call_output", "call_id": "3", "output": "three"},
            {"type": "item_reference", "id": "rs_unknown"},
            {"role": "user", "content": "and?"},
        ],
    )
    assert client.service.engine.prompt() == (
        "s:Help.\ns:dev\nu:hi\n"
        'a:(t)So[look {"a": 1}][ns__f {}][run {"input": "x\\"y"}]\nt:one\nt:two\nt:three\nu:and?\na:'
    )


def test_a_response_continues_the_one_before(serve):
    client = serve(CALLS, "Sunny", "Bye")
    first = ask(client, tools=[LOOK], instructions="Only now.")
    call = first["output"][-1]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "sun"}
    second = ask(client, input=[result], previous_response_id=first["id"])
    assert second["previous_response_id"] == first["id"]
    assert client.service.engine.prompt() == 'u:hi\na:So:\n[look {"a": 1}]\nt:sun\na:'
    references = [{"type": "item_reference", "id": item["id"]} for item in second["output"]]
    ask(client, input=[{"role": "user", "content": "hi"}, *references, {"role": "user", "content": "more"}])
    assert client.service.engine.prompt() == "u:hi\na:Sunny\nu:more\na:"
    assert client.get(f"{PATH}/{first['id']}").json() == first
    assert client.delete(f"{PATH}/{first['id']}").json() == {
        "id": first["id"],
        "object": "response",
        "deleted": True,
    }
    for response in (client.get(f"{PATH}/{first['id']}"), client.delete(f"{PATH}/{first['id']}")):
        check(response, 404, "id", "response_not_found")
    gone = client.post(PATH, json={"input": "hi", "previous_response_id": first["id"]})
    check(gone, 400, "previous_response_id", "previous_response_not_found")
    unknown = client.post(PATH, json={"input": [{"type": "item_reference", "id": "msg_x"}]})
    check(unknown, 404, "input[0].id", "item_not_found")


@pytest.mark.parametrize(("settings", "body"), [({"response_store": False}, {}), ({}, {"store": False})])
def test_nothing_is_kept_against_the_wish(serve, settings, body):
    client = serve("Hello", settings=settings)
    answer = ask(client, **body)
    assert answer["store"] is False
    check(client.get(f"{PATH}/{answer['id']}"), 404, "id", "response_not_found")


def test_the_store_is_bounded_and_the_newest_win():
    def reply(i, text="x"):
        fields = {
            "created_at": 1,
            "status": "completed",
            "instructions": None,
            "max_output_tokens": None,
            "model": "m",
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": None,
            "store": True,
            "temperature": 1.0,
            "text": {},
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "metadata": {"text": text},
        }
        return ResponseReply(id=f"r{i}", output=[], **fields)  # pyright: ignore

    store = ResponseStore(max_responses=3, max_bytes=10_000)
    for i in range(5):
        store.keep(reply(i), b"[]")
    assert [*store.responses] == ["r2", "r3", "r4"]
    store.keep(reply(5, "x" * 8000), b"[]")
    assert "r5" in store.responses and store.num_bytes <= 10_000
    store.keep(reply(6, "x" * 20_000), b"[]")
    assert store.responses == {} and store.num_bytes == 0


def test_names_of_namespaces_and_custom_tools(serve):
    client = serve("<call>ns__look{}</call>", '<call>run{"input": "a\\n\\ud83d\\ude00\\"b"}</call>')
    tools = [
        {"type": "namespace", "name": "ns", "description": "d", "tools": [LOOK]},
        {
            "type": "custom",
            "name": "run",
            "description": "Runs.",
            "format": {"type": "grammar", "syntax": "lark", "definition": "start: /a/"},
        },
        {
            "type": "custom",
            "name": "pick",
            "format": {"type": "grammar", "syntax": "regex", "definition": "[ab]"},
        },
        {"type": "web_search"},
    ]
    [call] = ask(client, tools=tools)["output"]
    assert (call["type"], call["name"], call["namespace"]) == ("function_call", "look", "ns")
    events = named_events(client.post(PATH, json={"input": "hi", "tools": tools, "stream": True}))
    item = events[-1]["response"]["output"][0]
    assert (item["type"], item["name"], item["input"]) == ("custom_tool_call", "run", 'a\n\U0001f600"b')
    deltas = [e["delta"] for e in events if e["type"] == "response.custom_tool_call_input.delta"]
    assert "".join(deltas) == item["input"]
    shown = {d["function"]["name"]: d["function"] for d in client.uses[-1].definitions}
    assert [*shown] == ["ns__look", "run", "pick"]
    assert shown["run"]["description"].endswith("start: /a/")
    assert shown["pick"]["parameters"]["properties"]["input"]["pattern"] == "^(?:[ab])$"


@pytest.mark.parametrize("size", range(1, 9))
def test_custom_input_is_read_at_every_chunk_size(size):
    text = 'é"\\\n\t/ \U0001f600 \x00 end'
    for written in (json.dumps({"input": text}), '{ "input" :' + json.dumps(text, ensure_ascii=False) + " }"):
        reader = InputReader()
        assert "".join(reader.feed(written[i : i + size]) for i in range(0, len(written), size)) == text
    alone = '{"input": "a\\ud83d b"}'
    reader = InputReader()
    assert "".join(reader.feed(alone[i : i + size]) for i in range(0, len(alone), size)) == "a\ufffd b"


@pytest.mark.parametrize(
    ("choice", "kind", "functions"),
    [
        (None, "auto", ["look", "stop"]),
        ("required", "required", ["look", "stop"]),
        ({"type": "function", "name": "stop"}, "named", ["look", "stop"]),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "stop"}]},
            "required",
            ["stop"],
        ),
    ],
)
def test_tool_choices(serve, choice, kind, functions):
    client = serve("Hello")
    ask(client, tools=[LOOK, LOOK | {"name": "stop"}], tool_choice=choice, parallel_tool_calls=False)
    use = client.uses[-1]
    assert use.choice == kind and [f.name for f in use.functions] == functions
    assert use.body.parallel_tool_calls is False


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"background": True}, "background", "unsupported_parameter"),
        ({"conversation": "c"}, "conversation", "unsupported_parameter"),
        ({"prompt": {"id": "p"}}, "prompt", "unsupported_parameter"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type", "unsupported_parameter"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0]",
            "unsupported_parameter",
        ),
        (
            {"input": [{"type": "function_call", "name": "f"}]},
            "input[0].call_id",
            "missing_required_parameter",
        ),
        ({"tools": [LOOK], "tool_choice": {"type": "web_search"}}, "tool_choice", "invalid_value"),
        ({"tools": [LOOK], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "missing_required_parameter"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x"}}},
            "text.format.schema",
            "missing_required_parameter",
        ),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}},
            "text.format",
            "invalid_value",
        ),
        ({"max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
        ({"temperature": 3}, "temperature", "invalid_value"),
    ],
)
def test_refusals_name_the_field(serve, body, param, code):
    check(serve("Hello").post(PATH, json={"input": "hi", **body}), 400, param, code)


def test_unknown_fields_and_tools_are_logged_once(serve, caplog):
    caplog.set_level(logging.INFO)
    client = serve("a", "b")
    for _ in range(2):
        ask(
            client,
            newest_field=1,
            tools=[{"type": "web_search"}],
            tool_choice="auto",
            include=[],
            truncation="auto",
        )
    told = [r.getMessage() for r in caplog.records if "known here" in r.getMessage()]
    assert len(told) == 2 and "newest_field" in told[0] and "web_search" in told[1]


def test_tokens_are_counted(serve):
    answer = serve().post(f"{PATH}/input_tokens", json={"input": "hi", "instructions": "x"}).json()
    assert answer == {"object": "response.input_tokens", "input_tokens": len("s:x\nu:hi\na:")}


def test_the_answer_carries_the_name_asked_for(serve):
    client = serve("a", "b", "c", settings={"served_model_name": ("big", "small")})
    assert [ask(client, **body)["model"] for body in ({}, {"model": "small"})] == ["big", "small"]
    chat = {"model": "small", "messages": [{"role": "user", "content": "hi"}]}
    assert client.post("/v1/chat/completions", json=chat).json()["model"] == "small"
    check(client.post(PATH, json={"input": "hi", "model": "other"}), 404, "model", "model_not_found")
    models = client.get("/v1/models").json()
    assert [m["id"] for m in models["data"]] == ["big", "small"] and models["has_more"] is False
    assert (models["first_id"], models["last_id"]) == ("big", "small")
    entry = client.get("/v1/models/small").json()
    assert entry["type"] == "model" and entry["display_name"] == "small" and entry["created_at"].endswith("Z")
