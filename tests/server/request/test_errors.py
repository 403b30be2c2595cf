"""Bad requests get a 4xx or 503 with the envelope and the right param, and leave nothing running."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.server.answers import UNSUPPORTED, VALUE, check
from support.server.fake_engine import TEMPLATE, ByteCodec, FakeEngine, served

from jmoe.server.request.schema import ChatRequest, CompletionRequest

CHAT = "/v1/chat/completions"
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    with served(FakeEngine(ByteCodec()), directory=directory, max_body_bytes=200_000) as client:
        yield client


BAD_COMPLETIONS = [
    ({"max_tokens": -2}, "max_tokens", VALUE),
    ({"max_tokens": True}, "max_tokens", VALUE),
    ({"max_tokens": "5"}, "max_tokens", VALUE),
    ({"max_tokens": 1.5}, "max_tokens", VALUE),
    ({"max_tokens": 0}, "max_tokens", VALUE),
    ({"max_tokens": 4, "min_tokens": 5}, "min_tokens", VALUE),
    ({"temperature": 3}, "temperature", VALUE),
    ({"temperature": -0.1}, "temperature", VALUE),
    ({"top_p": -0.1}, "top_p", VALUE),
    ({"top_p": 1.1}, "top_p", VALUE),
    ({"top_k": -2}, "top_k", VALUE),
    ({"n": 0}, "n", VALUE),
    ({"n": 129}, "n", VALUE),
    ({"n": 128, "prompt": ["a"] * 9}, "n", VALUE),
    ({"logprobs": 21}, "logprobs", VALUE),
    ({"logprobs": True}, "logprobs", VALUE),
    ({"seed": 2**70}, "seed", VALUE),
    ({"stop": ["a"] * 17}, "stop", VALUE),
    ({"stop": ["a", ""]}, "stop[1]", VALUE),
    ({"stop_token_ids": [258]}, "stop_token_ids", VALUE),
    ({"stream_options": {"include_usage": True}}, "stream_options", VALUE),
    ({"stream": True, "stream_options": {"foo": 1}}, "stream_options.foo", "unknown_parameter"),
    ({"foo": 1}, "foo", "unknown_parameter"),
    ({"moe": {"exact": 1}}, "moe.exact", VALUE),
    ({"moe": {"exacts": True}}, "moe.exacts", "unknown_parameter"),
    ({"prompt": ""}, "prompt", VALUE),
    ({"prompt": []}, "prompt", VALUE),
    ({"prompt": [[]]}, "prompt", VALUE),
    ({"prompt": None}, "prompt", VALUE),
    ({"prompt": ["a", 1]}, "prompt", VALUE),
    ({"prompt": [1, True]}, "prompt[1]", VALUE),
    ({"prompt": ["a"] * 1025}, "prompt", VALUE),
    ({"prompt": [5000]}, "prompt", VALUE),
    ({"prompt": [-1], "echo": True}, "prompt", VALUE),
    ({"prompt": [2**70], "echo": True}, "prompt", VALUE),
    ({"prompt": "a" * 60}, "prompt", "context_length_exceeded"),
    ({"suffix": "x"}, "suffix", UNSUPPORTED),
    ({"best_of": 2}, "best_of", UNSUPPORTED),
    ({"logit_bias": {"5": 101}}, "logit_bias[...]", VALUE),
    ({"logit_bias": {"258": 1}}, "logit_bias", VALUE),
    ({"logit_bias": {"-1": 1}}, "logit_bias", VALUE),
    ({"logit_bias": {"5": 1, "05": 1}}, "logit_bias", VALUE),
    ({"logit_bias": {str(i): 1 for i in range(257)}}, "logit_bias", VALUE),
    ({"cache_salt": ""}, "cache_salt", VALUE),
    ({"cache_salt": "s" * 257}, "cache_salt", VALUE),
    ({"priority": 1}, "priority", UNSUPPORTED),
    ({"skip_special_tokens": False}, "skip_special_tokens", UNSUPPORTED),
    ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens", UNSUPPORTED),
    ({"presence_penalty": 0.5}, "presence_penalty", UNSUPPORTED),
    ({"frequency_penalty": 3}, "frequency_penalty", UNSUPPORTED),
    ({"frequency_penalty": False}, "frequency_penalty", UNSUPPORTED),
    ({"skip_special_tokens": 1}, "skip_special_tokens", UNSUPPORTED),
    ({"repetition_penalty": 1.1}, "repetition_penalty", UNSUPPORTED),
    ({"min_p": 1.1}, "min_p", VALUE),
    ({"response_format": {"type": "xml"}}, "response_format.type", VALUE),
]
BAD_CHATS = [
    ({"messages": []}, "messages", VALUE),
    ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role", VALUE),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", VALUE),
    ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]},
     "messages[0].tool_call_id", VALUE),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls", VALUE),
    ({"messages": [*USER, {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f",
      "arguments": "[]"}}]}]}, "messages[1].tool_calls[0].function.arguments", VALUE),
    ({"messages": [{"role": "user"}]}, "messages[0].content", VALUE),
    ({"messages": [{"role": "user", "content": "x", "foo": 1}]}, "messages[0].foo", "unknown_parameter"),
    ({"messages": [*USER, {"role": "assistant", "tool_calls": [{}]}]},
     "messages[1].tool_calls[0].id", "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
     "messages[0].content[0]", UNSUPPORTED),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", VALUE),
    ({"messages": [*USER, {"role": "tool", "content": "1", "tool_call_id": "c"}]},
     "messages[1].tool_call_id", VALUE),
    ({"messages": [{"role": "user", "content": "a" * 80}]}, "messages", "context_length_exceeded"),
    ({"chat_template": "{{ 1 }}"}, "chat_template", UNSUPPORTED),
    ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs", VALUE),
    ({"chat_template_kwargs": {"eos_token": "x"}}, "chat_template_kwargs", VALUE),
    ({"chat_template_kwargs": {"x": [1]}}, "chat_template_kwargs[...]", VALUE),
    ({"max_tokens": 0}, "max_tokens", VALUE),
    ({"max_completion_tokens": 0}, "max_completion_tokens", VALUE),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "max_completion_tokens", VALUE),
    ({"logprobs": 1}, "logprobs", VALUE),
    ({"top_logprobs": 2}, "top_logprobs", VALUE),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", VALUE),
]  # fmt: skip


@pytest.mark.parametrize(("change", "param", "code"), BAD_COMPLETIONS)
def test_bad_completion(client, change, param, code):
    check(client.post("/v1/completions", json={"prompt": "a", **change}), 400, param, code)
    assert not client.service.generations


@pytest.mark.parametrize(("change", "param", "code"), BAD_CHATS)
def test_bad_chat(client, change, param, code):
    check(client.post(CHAT, json={"messages": USER, "max_tokens": 2, **change}), 400, param, code)


def post(client, raw: bytes, path="/v1/completions"):
    return client.post(path, content=raw, headers={"content-type": "application/json; charset=utf-8"})


@pytest.mark.parametrize("raw", [
    b"", b"{", b"[1]", b"null", b'"x"', b'{"prompt": "a"} x', b'{"prompt": NaN}', b'{"prompt": "\xff"}',
    b"\xff", b"[" * 100_000, b'{"prompt": "a", "chat_template": ' + b"[" * 100_000,
    b'{"prompt": "\\ud800"}', b'{"prompt": "\\ud83d\\ude00 \\udc00"}',
])  # fmt: skip
def test_bodies_that_are_no_json_object(client, raw):
    check(post(client, raw), 400, None, "invalid_json")


def test_numbers_that_are_none(client):
    check(post(client, b'{"prompt": "a", "temperature": 1e999}'), 400, "temperature", VALUE)
    check(post(client, b"{}"), 400, "prompt", "missing_required_parameter")
    assert "surrogate" in post(client, b'{"prompt": "\\ud800"}').json()["error"]["message"]
    assert post(client, b'{"prompt": "\\ud83d\\ude00", "max_tokens": 1}').status_code == 200


def test_one_long_line_never_comes_back_whole(client):
    response = client.post("/v1/completions", json={"prompt": "a", "x" * 50_000: 1})
    assert len(response.content) < 1000


def test_content_type_and_size(client):
    check(client.post("/v1/completions", content=b"{}"), 415, None, "unsupported_media_type")
    check(client.post("/v1/completions", data={"a": "b"}), 415, None, "unsupported_media_type")
    check(post(client, b" " * 200_001), 413, None, "body_too_large")
    chunks = (b" " * 50_000 for _ in range(100))  # the body is chunked and declares no length
    kind = {"content-type": "application/json"}
    check(client.post("/v1/completions", content=chunks, headers=kind), 413, None, "body_too_large")
    assert post(client, b'{"prompt": "a", "max_tokens": 1}'.ljust(200_000)).status_code == 200


def test_unknown_places(client):
    check(client.get("/v1/embeddings"), 404, None, "unknown_url")
    response = client.get("/v1/completions")
    check(response, 405, None, "method_not_allowed")
    assert response.headers["allow"] == "POST"
    assert "GET" in client.post("/v1/models", json={}).headers["allow"]
    check(
        client.post("/v1/completions", json={"prompt": "a", "model": "other"}),
        404,
        "model",
        "model_not_found",
    )
    check(client.get("/v1/models/other"), 404, "model", "model_not_found")


def test_tokenizer_routes(client):
    check(client.post("/tokenize", json={}), 400, "prompt", VALUE)
    check(client.post("/tokenize", json={"prompt": "a", "messages": USER}), 400, "prompt", VALUE)
    check(client.post("/detokenize", json={"tokens": [258]}), 400, "tokens", VALUE)
    check(client.post("/detokenize", json={"tokens": [-1]}), 400, "tokens[0]", VALUE)


def test_without_a_tokenizer_text_is_refused():
    with served(FakeEngine()) as client:
        check(client.post("/v1/completions", json={"prompt": "a"}), 400, "prompt", VALUE)
        check(client.post(CHAT, json={"messages": USER}), 400, "messages", "no_chat_template")
        check(client.post("/detokenize", json={"tokens": [1]}), 400, "tokens", VALUE)
        scored = {"prompt": [5, 6], "max_tokens": 1, "logprobs": 0, "echo": True, "return_token_ids": True}
        choice = client.post("/v1/completions", json=scored).json()["choices"][0]
        assert choice["logprobs"]["tokens"] == ["token_id:5", "token_id:6", "token_id:5"]
        assert (choice["text"], choice["token_ids"]) == ("", [5])


def test_full_queue_takes_all_choices_or_none():
    with served(FakeEngine(ByteCodec(), room=2)) as client:
        response = client.post("/v1/completions", json={"prompt": "a", "n": 3})
        check(response, 503, None, "queue_full")
        assert response.headers["retry-after"] == "1" and not client.service.generations
        assert client.post("/v1/completions", json={"prompt": "a", "n": 2}).status_code == 200


def test_draining():
    with served(FakeEngine(ByteCodec())) as client:
        client.service.is_draining = True
        for path in ("/ready", "/health", "/ping"):
            check(client.get(path), 503, None, "draining")
        response = client.post("/v1/completions", json={"prompt": "a"})
        check(response, 503, None, "draining")
        assert response.headers["retry-after"] == "1" and client.get("/live").status_code == 200


def test_dead_engine():
    with served(FakeEngine(ByteCodec())) as client:
        client.service.engine.die()
        for path in ("/live", "/ready", "/health", "/moe/stats"):
            check(client.get(path), 503, None, "engine_dead")
        check(client.post("/v1/completions", json={"prompt": "a"}), 503, None, "engine_dead")
        assert "jmoe_num_requests_running" in client.get("/metrics").text


def test_failing_request():
    with served(FakeEngine(ByteCodec(), fails_at=2)) as client:
        body = {"prompt": "abcd", "max_tokens": 8}
        assert "NaN logits" in check(client.post("/v1/completions", json=body), 500)
        lines = client.post("/v1/completions", json={**body, "stream": True}).text.strip().split("\n\n")
        assert lines[-1] == "data: [DONE]" and len(lines) == 4
        assert set(json.loads(lines[-2][6:])["error"]) == {"message", "type", "param", "code"}


def test_internal_error_tells_nothing_but_an_id():
    with served(FakeEngine(ByteCodec())) as client:
        client.service.engine.submit = lambda requests: 1 / 0
        response = client.post("/v1/completions", json={"prompt": "a"}, headers={"x-request-id": "r-7"})
        message = check(response, 500, None, "internal_error")
        assert (
            "r-7" in message and "division" not in response.text and response.headers["x-request-id"] == "r-7"
        )
        assert not client.service.generations


def test_api_key():
    with served(FakeEngine(ByteCodec()), api_key="secret") as client:
        for path in ("/live", "/ready", "/health", "/ping"):
            assert client.get(path).status_code == 200
        for header in ({}, {"authorization": "Bearer "}, {"authorization": "Bearer secre"},
                       {"authorization": "Basic secret"}, {"authorization": b"Bearer \xff"}):  # fmt: skip
            for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere", "//live", "/moe/stats"):
                response = client.get(path, headers=header)
                check(response, 401, None, "invalid_api_key")
                assert response.headers["www-authenticate"] == "Bearer"
        good = {"authorization": "bearer secret", "host": "evil/live?"}
        assert client.get("/v1/models", headers=good).status_code == 200
        check(client.get("/v1/models", headers={"host": "x/live?"}), 401, None, "invalid_api_key")


def test_request_ids_are_ours_where_theirs_cannot_be_printed(client):
    assert client.get("/live", headers={"x-request-id": "a b"}).headers["x-request-id"] != "a b"
    assert len(client.get("/live", headers={"x-request-id": "x" * 500}).headers["x-request-id"]) == 32


NUMBERS = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.integers(-3, 200)
LEAVES = st.none() | st.booleans() | NUMBERS | st.text(max_size=8)
VALUES = st.recursive(
    LEAVES, lambda v: st.lists(v, max_size=5) | st.dictionaries(st.text(max_size=5), v, max_size=3)
)


@pytest.mark.parametrize(
    ("path", "kind", "base"),
    [("/v1/completions", CompletionRequest, {"prompt": "a"}), (CHAT, ChatRequest, {"messages": USER})],
)
def test_no_field_makes_the_server_fail(client, path, kind, base):
    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(st.dictionaries(st.sampled_from(kind.__struct_fields__), VALUES, min_size=1, max_size=2))
    def answers(changes):
        raw = json.dumps({**base, "max_tokens": 2, **changes}).encode()
        response = post(client, raw, path)
        assert response.status_code < 500, (changes, response.text)
        if response.status_code != 200:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    answers()
