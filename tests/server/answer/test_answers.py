"""Tests the answers to good requests: shapes, order, streams, log-probabilities, metrics."""

import json

import pytest
from support.server.answers import events
from support.server.fake_engine import BOS, EOS, TEMPLATE, ByteCodec, FakeEngine, eventually, served


@pytest.fixture
def client(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": TEMPLATE, "eos_token": "</s>"})
    )
    with served(FakeEngine(ByteCodec()), directory=tmp_path) as client:
        yield client


def complete(client, **body):
    response = client.post("/v1/completions", json={"model": "fake", "temperature": 0, **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_completion_has_every_key_that_clients_read(client):
    answer = complete(client, prompt="hé", max_tokens=4)
    assert (
        answer["object"] == "text_completion"
        and answer["model"] == "fake"
        and answer["id"].startswith("cmpl-")
    )
    assert answer["choices"] == [{"index": 0, "text": "hé", "logprobs": None, "finish_reason": "length"}]
    counts = {"prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8}
    assert answer["usage"] == counts | {"prompt_tokens_details": {"cached_tokens": 0}}


@pytest.mark.parametrize("prompt", ["ab", ["ab"], [BOS, 97, 98], [[BOS, 97, 98]]])
def test_prompt_forms_mean_the_same(client, prompt):
    assert complete(client, prompt=prompt, max_tokens=3)["choices"][0]["text"] == "ab"


def test_choices_are_prompt_major_and_seeds_count_up(client):
    answer = complete(client, prompt=["a", "b"], n=2, seed=7, max_tokens=2)
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [(0, "a"), (1, "a"), (2, "b"), (3, "b")]
    assert [r.params.seed for r in client.service.engine.seen] == [7, 8, 7, 8]
    assert answer["usage"]["prompt_tokens"] == 4


def test_null_is_the_default_and_neutral_values_pass(client):
    nulls = dict.fromkeys(("seed", "logprobs", "n", "stop", "stream_options", "logit_bias", "user", "top_p"))
    neutral = {"repetition_penalty": 1.0, "presence_penalty": 0, "min_p": 0.0, "best_of": 1, "suffix": "",
               "metadata": {"a": "b"}, "store": False, "response_format": {"type": "text"},
               "moe": {"exact": True}}  # fmt: skip
    answer = complete(client, prompt="abc", **nulls, **neutral)
    assert answer["usage"]["completion_tokens"] == 16
    params = client.service.engine.seen[0].params
    assert params.seed is not None and (params.top_p, params.logprobs, params.stop) == (1.0, None, ())


def test_stop_string_ends_and_is_cut(client):
    choice = complete(client, prompt="abcd", stop="cd", max_tokens=20)["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("ab", "stop", "cd")


def test_echo_and_logprobs_cover_prompt_and_answer(client):
    choice = complete(client, prompt=[97, 98, EOS], echo=True, logprobs=1, max_tokens=4)["choices"][0]
    assert choice["text"] == "ab</s>ab" and choice["finish_reason"] == "stop"
    scores = choice["logprobs"]
    assert scores["tokens"] == ["a", "b", "</s>", "a", "b", "</s>"]
    assert scores["text_offset"] == [0, 1, 2, 6, 7, 8]
    assert scores["token_logprobs"] == [None] + [-0.5] * 5
    rows = list(zip(*(scores[k] for k in ("tokens", "token_logprobs", "top_logprobs")), strict=True))
    for name, value, top in rows[1:]:
        assert top[name] == value and max(top.values()) == -0.25


def test_max_tokens_0_with_echo_scores_the_prompt_alone(client):
    choice = complete(client, prompt="xyz", echo=True, logprobs=0, max_tokens=0)["choices"][0]
    assert choice["text"] == "xyz" and choice["logprobs"]["tokens"] == ["<s>", "x", "y", "z"]
    assert choice["logprobs"]["top_logprobs"][1] == {"x": -0.5}


def test_alternatives_of_equal_spelling_are_all_reported(client):
    """All bytes above 127 have the text U+FFFD; the best alternative is reported next to the chosen token."""
    choice = complete(client, prompt=[200, 201], logprobs=3, max_tokens=1)["choices"][0]
    assert choice["logprobs"]["top_logprobs"][0] == {
        "token_id:201": -0.25,
        "\ufffd": -0.5,
        "token_id:202": -2.0,
    }


@pytest.mark.parametrize(
    "extra", [{}, {"echo": True}, {"n": 2, "logprobs": 2}, {"echo": True, "logprobs": 1}]
)
def test_stream_adds_up_to_the_whole_answer(client, extra):
    body = {"prompt": ["añb", "cd"], "max_tokens": 6, "temperature": 0, "seed": 1, **extra}
    whole = complete(client, **body)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = events(client.post("/v1/completions", json={**body, **options}))
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)
    for choice in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        if choice["logprobs"] is not None:
            for key, value in choice["logprobs"].items():
                assert [v for c in mine for v in c["logprobs"][key]] == value


def test_continuous_usage_counts_up(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": "ab", "max_tokens": 3, "stream": True, "stream_options": options}
    counts = [c["usage"]["completion_tokens"] for c in events(client.post("/v1/completions", json=body))]
    assert counts == [1, 2, 3, 3]


CHAT = {
    "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
    "max_completion_tokens": 5,
}


def test_chat_answer(client):
    answer = client.post("/v1/chat/completions", json={**CHAT, "logprobs": True, "top_logprobs": 2}).json()
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "u:hi\n", "refusal": None}
    first = choice["logprobs"]["content"][0]
    assert (first["token"], first["bytes"], first["logprob"]) == ("u", [117], -0.5)
    assert [t["token"] for t in first["top_logprobs"]] == ["v", "u"]
    assert answer["usage"]["prompt_tokens"] == len("u:hi\na:")  # special tokens are not added again


def test_chat_without_limit_fills_the_context(client):
    answer = client.post("/v1/chat/completions", json={"messages": CHAT["messages"]}).json()
    assert answer["usage"]["total_tokens"] == 64 and answer["choices"][0]["finish_reason"] == "length"


def test_chat_stream_begins_with_roles(client):
    chunks = events(client.post("/v1/chat/completions", json={**CHAT, "stream": True, "n": 2}))
    assert [c["choices"][0]["delta"].get("role") for c in chunks[:2]] == ["assistant"] * 2
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    text = "".join(c["choices"][0]["delta"]["content"] for c in chunks if c["choices"][0]["index"] == 1)
    assert text == "u:hi\n"


def test_developer_is_system(client):
    messages = [
        {"role": "developer", "content": "x"},
        {"role": "assistant", "content": "y", "tool_calls": None},
    ]
    answer = client.post("/tokenize", json={"messages": messages, "return_token_strs": True}).json()
    assert "".join(answer["token_strs"]) == "s:x\na:y\na:" and answer["max_model_len"] == 64


def test_tokenize_and_back(client):
    assert client.post("/tokenize", json={"prompt": "ab"}).json()["tokens"] == [BOS, 97, 98]
    plain = client.post("/tokenize", json={"prompt": "ab", "add_special_tokens": False}).json()
    assert plain == {"count": 2, "max_model_len": 64, "tokens": [97, 98]}
    assert client.post("/detokenize", json={"tokens": [BOS, 97]}).json() == {"prompt": "<s>a"}


@pytest.mark.parametrize("path", ["/health", "/ready", "/live", "/ping", "/metrics", "/version", "/v1/models",
                                  "/v1/models/fake", "/openapi.json", "/moe/stats"])  # fmt: skip
def test_get_and_head(client, path):
    assert client.get(path, headers={"x-request-id": "r1"}).headers["x-request-id"] == "r1"
    assert client.get(path).status_code == client.head(path).status_code == 200


def test_served_name_may_hold_slashes():
    with served(FakeEngine(), served_model_name="org/model") as client:
        assert client.get("/v1/models/org/model").json()["id"] == "org/model"
        assert client.get("/v1/models").json()["data"][0]["max_model_len"] == 64


def test_openapi_lists_every_route(client):
    document = client.get("/openapi.json").json()
    routes = {r.path.replace(":path", "") for r in client.app.app.app.routes}
    assert set(document["paths"]) == routes - {"/moe/events"}, "all but the one that never ends"
    assert "prompt" in document["components"]["schemas"]["CompletionRequest"]["required"]


def test_metrics_count_what_happened(client):
    complete(client, prompt="abc", max_tokens=3)
    complete(client, prompt="abc", max_tokens=0, echo=True)
    metrics = client.get("/metrics").text
    for line in ("jmoe_prompt_tokens_total 8.0", "jmoe_generation_tokens_total 3.0",
                 "jmoe_kv_cache_usage_perc 0.25",
                 'jmoe_request_success_total{finished_reason="length"} 2.0', "jmoe_num_requests_running 0.0",
                 'jmoe_request_success_total{finished_reason="abort"} 0.0', "jmoe_num_requests_waiting 0.0",
                 "jmoe_time_to_first_token_seconds_count 1.0", "jmoe_inter_token_latency_seconds_count 2.0",
                 "jmoe_e2e_request_latency_seconds_count 1.0", "jmoe_request_queue_time_seconds_count 2.0",
                 "jmoe_compilations_after_warmup_total 0.0", 'jmoe_moe_active_experts{layer="1"} 3.0',
                 'jmoe_moe_assignments_total{layer="0"} 12.0',
                 'jmoe_moe_dropped_assignments_total{layer="0"} 10.0',
                 'jmoe_moe_rerouted_assignments_total{layer="0"} 8.0',
                 'jmoe_moe_remapped_assignments_total{layer="0"} 10.0',
                 'jmoe_moe_remote_assignments_total{layer="0"} 2.0',
                 'jmoe_moe_transport_bytes_total{layer="1"} 1200.0',
                 'jmoe_moe_transport_useful_bytes_total{layer="1"} 800.0',
                 'jmoe_moe_expert_cache_hits_total{layer="0"} 14.0',
                 'jmoe_moe_expert_cache_misses_total{layer="0"} 6.0',
                 'jmoe_moe_expert_cache_evictions_total{layer="1"} 4.0',
                 'jmoe_moe_prefetch_bytes_total{layer="1"} 1800.0',
                 'jmoe_moe_prefetch_useful_bytes_total{layer="0"} 600.0'):  # fmt: skip
        assert line in metrics.splitlines(), line
    assert eventually(lambda: not client.service.generations) and not client.service.metrics.last_token
