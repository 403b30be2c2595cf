"""Tests the fields that clients send by default: those of OpenAI's, vLLM's and llama-server's requests.

Each field passes at null and at values that request nothing. Any other value works or gets a 400 that names
the field.
"""

import json

import msgspec
import pytest
from openai.types import completion_create_params as openai_text
from openai.types.chat import completion_create_params as openai_chat
from support.server.answers import events
from support.server.bodies import CALL, OBJECT
from support.server.chat_models import NO_CALLS
from support.server.fake_engine import TEMPLATE, VOCAB, ByteCodec, FakeEngine, served

from jmoe.server.request.checks import check_chat, check_completion
from jmoe.server.request.decoding import decode
from jmoe.server.request.params import chat_params, completion_params
from jmoe.server.request.schema import ChatRequest, CompletionRequest

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
BASE = {TEXT: {"prompt": "abc", "max_tokens": 2}, CHAT: {"messages": [{"role": "user", "content": "hi"}]}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": OBJECT}}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    with served(FakeEngine(ByteCodec()), directory=directory) as client:
        yield client


def ask(client, path, **fields):
    return client.post(path, json=BASE[path] | fields)


def taken(client, path, **fields):
    response = ask(client, path, **fields)
    assert response.status_code == 200, (fields, response.text)
    return client.service.engine.seen[-1].params


def read(path, **fields):
    """Returns the sampling parameters of a request that is not sent."""
    raw = json.dumps(BASE[path] | fields).encode()
    if path == CHAT:
        return chat_params(check_chat(decode(raw, ChatRequest), NO_CALLS), VOCAB, ())
    check_completion(body := decode(raw, CompletionRequest))
    return completion_params(body, VOCAB)


def refused(client, path, field, value):
    response = ask(client, path, **{field: value})
    error = response.json()["error"]
    assert response.status_code == 400, (field, value)
    assert error["param"].split("[")[0].split(".")[0] == field and field in error["message"], (value, error)


# For each field: (values that pass, values that are refused). null passes everywhere.
SHARED = {
    "frequency_penalty": ([0, 0.0], [0.5, -1]),
    "presence_penalty": ([0], [2]),
    "logit_bias": ([{}, {"5": 1}], [{"x": 1}, {"5": 101}]),
    "max_tokens": ([1, 40, -1], [0, -2, 2**31]),
    "n": ([1, 2], [0, 129]),
    "seed": ([0, -1, 2**63 - 1], [2**63, "1"]),
    "stop": (["", [], "x", ["x"] * 16], [["x"] * 17, [""], 5]),
    "stream": ([False, True], [1]),
    "stream_options": (
        [{}, {"include_usage": False}, {"include_usage": None}],
        [{"include_usage": True}, []],
    ),
    "temperature": ([0, 1, 2], [-1, 2.1]),
    "top_p": ([0, 0.5, 1], [1.1, -0.1]),
    "user": (["", "u"], [5]),
}
OPENAI = {
    TEXT: SHARED | {
        "best_of": ([1], [2, 0]),
        "echo": ([False, True], [1]),
        "logprobs": ([0, 5], [21, True]),
        "suffix": ([""], ["x"]),
    },
    CHAT: SHARED | {
        "audio": ([], [{"voice": "alloy", "format": "wav"}]),
        "function_call": (["none", "auto"], [{"name": "f"}]),
        "functions": ([[]], [[{"name": "f"}]]),
        "logprobs": ([False, True], [1]),
        "max_completion_tokens": ([1, 40, -1], [0, -2]),
        "metadata": ([{}, {"a": "b"}], [[1]]),
        "modalities": ([["text"]], [["text", "audio"]]),
        "moderation": ([], [{"model": "x"}]),
        "parallel_tool_calls": ([True, False], [1]),
        "prediction": ([], [{"type": "content", "content": "x"}]),
        "prompt_cache_key": (["k"], [5]),
        "prompt_cache_options": ([{}, {"mode": "explicit", "ttl": "30m"}], [5]),
        "prompt_cache_retention": (["in_memory", "24h"], [5]),
        "reasoning_effort": (["none", "minimal", "low", "medium", "high", "xhigh"], ["much", 1]),
        "response_format": ([{"type": "text"}, {"type": "json_object"}], [{"type": "xml"}, "text"]),
        "safety_identifier": (["s"], [5]),
        "service_tier": (["auto", "default", "flex", "priority"], [5]),
        "store": ([False, True], ["no"]),
        "tool_choice": (["none", "auto"], ["required", "maybe", {"type": "allowed_tools"}]),
        "tools": ([[]], [[{"type": "custom", "custom": {"name": "x"}}], {}]),
        "top_logprobs": ([0], [1, 21]),
        "verbosity": (["medium"], ["low"]),
        "web_search_options": ([], [{}]),
    },
}  # fmt: skip
DOCUMENTED = {
    TEXT: (openai_text.CompletionCreateParamsNonStreaming, openai_text.CompletionCreateParamsStreaming),
    CHAT: (openai_chat.CompletionCreateParamsNonStreaming, openai_chat.CompletionCreateParamsStreaming),
}
CASES = [(path, field) for path, fields in OPENAI.items() for field in fields]


@pytest.mark.parametrize("path", OPENAI)
def test_every_field_that_openai_documents_is_known_here(path):
    """Every field that openai documents is in this file. For a new field, add above the values that pass."""
    documented = {name for kind in DOCUMENTED[path] for name in kind.__annotations__}
    assert documented - {"model", "prompt", "messages"} <= set(OPENAI[path])


@pytest.mark.parametrize(("path", "field"), CASES)
def test_a_field_of_openai_works_or_is_refused_by_name(client, path, field):
    passing, failing = OPENAI[path][field]
    for value in (None, *passing):
        taken(client, path, **{field: value})
    for value in failing:
        refused(client, path, field, value)


OFF = ("use_beam_search", "early_stopping", "include_stop_str_in_output", "ignore_eos", "watermarking",
       "return_tokens_as_token_ids", "return_token_ids", "return_token_offsets", "return_prompt_text",
       "return_routed_experts", "return_hidden_states", "no_stop_trim", "timings_per_token",
       "return_progress", "backend_sampling", "echo")  # fmt: skip
ON = ("skip_special_tokens", "spaces_between_special_tokens", "return_mm_kwargs", "cache_prompt")
NUMBERS = {
    "top_k": [0], "min_p": [0], "repetition_penalty": [1, 1.0], "length_penalty": [1], "min_tokens": [0],
    "priority": [0], "stream_interval": [1], "thinking_token_budget": [-1], "best_of": [1],
    "routed_experts_prompt_start": [0], "n_predict": [-1],
    "n_probs": [0], "n_keep": [0], "min_keep": [0], "id_slot": [-1],
    "repeat_penalty": [1.0], "typical_p": [1], "typ_p": [1.0], "tfs_z": [1], "top_a": [0],
    "top_n_sigma": [-1.0], "mirostat": [0], "dynatemp_range": [0.0], "xtc_probability": [0],
    "dry_multiplier": [0.0],
}  # fmt: skip
EMPTY = {"bad_words": [[]], "stop_token_ids": [[]], "vllm_xargs": [{}], "kv_transfer_params": [{}],
         "truncation_side": ["left"], "session_id": ["s"]}  # fmt: skip
NULL = ("prompt_logprobs", "allowed_token_ids", "logprob_token_ids", "truncate_prompt_tokens", "request_id",
        "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "priority",
        "guided_decoding_backend", "guided_whitespace_pattern", "structural_tag", "logits_processors",
        "repetition_detection", "ec_transfer_params", "prompt_embeds", "cache_salt", "grammar", "json_schema",
        "regex", "ebnf", "lora_path", "rid", "samplers", "chat_template")  # fmt: skip
EXTRA = {name: [None] for name in NULL} | {name: [None, False] for name in OFF}
EXTRA |= {name: [None, True] for name in ON} | {name: [None, *v] for name, v in (NUMBERS | EMPTY).items()}
EXTRA_CHAT = {
    "documents": [None, []], "add_generation_prompt": [None, True], "continue_final_message": [None, False],
    "chat_template_kwargs": [None, {}], "include_reasoning": [None, True], "add_special_tokens": [None],
    "media_io_kwargs": [None, {}], "mm_processor_kwargs": [None, {}], "separate_reasoning": [None, True],
    "stream_reasoning": [None, True], "reasoning_format": [None, "none", "auto"],
}  # fmt: skip


def test_default_values_of_other_servers_fields_change_nothing(client):
    """Default values change nothing, each alone and all at once, as the servers' web pages send them."""
    for path, fields in ((TEXT, EXTRA), (CHAT, EXTRA | EXTRA_CHAT)):
        plain = read(path)
        for name, values in fields.items():
            for value in values:
                assert read(path, **{name: value}) == plain, (name, value)
        assert taken(client, path, seed=1, **{name: v[-1] for name, v in fields.items()}) == read(
            path, seed=1
        )


def test_other_values_of_these_fields_are_refused_by_name(client):
    for name in (*OFF[:3], *OFF[4:6], *OFF[7:]):
        refused(client, CHAT, name, True)
    for name in ON[:3]:
        refused(client, TEXT, name, False)
    for name, value in {"prompt_logprobs": 0, "allowed_token_ids": [1], "best_of": 3, "typical_p": 0.9,
                        "bad_words": ["x"], "n_predict": 5, "mirostat": 2, "documents": [{"text": "x"}],
                        "dry_multiplier": 0.8, "vllm_xargs": {"a": 1}, "include_reasoning": False,
                        "length_penalty": True, "guided_json": {}, "request_id": "x"}.items():  # fmt: skip
        refused(client, CHAT, name, value)


def test_as_many_as_are_answered_is_best_of_all(client):
    for path in (TEXT, CHAT):
        taken(client, path, n=2, best_of=2)
        assert ask(client, path, n=2, best_of=3).json()["error"]["param"] == "best_of"


def test_minus_one_is_no_limit(client):
    for path, field in ((TEXT, "max_tokens"), (CHAT, "max_tokens"), (CHAT, "max_completion_tokens")):
        assert taken(client, path, **{field: -1}).max_tokens is None
    assert ask(client, TEXT, max_tokens=-1).json()["usage"]["total_tokens"] == 64, "to the context's end"


def test_stop_strings(client):
    assert taken(client, TEXT, stop="").stop == taken(client, TEXT, stop=[]).stop == ()
    many = [f"stop {i}" for i in range(16)]
    assert taken(client, TEXT, stop=many).stop == tuple(many)
    client.service.turn_ends = tuple(f"<end {i}>" for i in range(48))
    try:
        assert len(taken(client, CHAT, stop=many).stop) == 64, "with the model's own"
    finally:
        client.service.turn_ends = ()


def test_no_tools_are_no_tools(client):
    for choice in (None, "auto", "none"):
        answer = ask(client, CHAT, tools=[], tool_choice=choice, parallel_tool_calls=True).json()
        assert (
            answer["choices"][0]["message"]["content"] and "tool_calls" not in answer["choices"][0]["message"]
        )
    refused(client, CHAT, "tool_choice", "required")
    assert ask(client, CHAT, tools=[TOOL]).json()["error"]["param"] == "tool_choice"


# ---- null --------------------------------------------------------------------------------------------

NESTED = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "1", "tool_call_id": "c"},
    ],
    "tools": [TOOL],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "stream_options": {"include_usage": False},
    "response_format": {"type": "text"},
    "moe": {"exact": True},
}
# These hold data and not fields, and in data a null is a value like any other.
PLACES = ["$", "$.messages[0]", "$.messages[1].tool_calls[0]", "$.messages[1].tool_calls[0].function",
          "$.tools[0]", "$.tools[0].function", "$.tool_choice", "$.tool_choice.function", "$.stream_options",
          "$.response_format", "$.moe"]  # fmt: skip


def inside(body, place):
    for step in place.replace("[", ".").replace("]", "").split(".")[1:]:
        body = body[int(step) if step.isdecimal() else step]
    return body


@pytest.mark.parametrize("place", PLACES)
def test_null_is_absent_also_where_the_field_is_unknown(place):
    body = json.loads(json.dumps(NESTED))
    plain = decode(json.dumps(body).encode(), ChatRequest)
    inside(body, place)["some_new_field"] = None
    assert decode(json.dumps(body).encode(), ChatRequest) == plain


def test_nulls_that_are_data_stay():
    schema = {"type": "object", "properties": {"a": {"default": None, "enum": [None]}}, "x": None}
    format = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "new": None}, "new": None}
    body = NESTED | {"response_format": format, "new": None, "chat_template_kwargs": {"a": None}}
    body["tools"] = [{"type": "function", "function": {"name": "f", "parameters": schema}, "new": None}]
    read = msgspec.to_builtins(decode(json.dumps(body).encode(), ChatRequest))
    assert read["response_format"]["json_schema"]["schema"] == schema
    assert read["tools"][0]["function"]["parameters"] == schema
    assert read["chat_template_kwargs"] == {"a": None}


def test_an_unknown_null_hides_nothing(client):
    """The next mistake in the body is still reported, with its place."""
    for path, extra, param in ((TEXT, {"max_tokens": "5"}, "max_tokens"), (TEXT, {"foo": 1}, "foo"),
                               (CHAT, {"messages": [{"role": "x"}]}, "messages[0].role")):  # fmt: skip
        error = ask(client, path, new=None, **extra).json()["error"]
        assert error["param"] == param
    prompt = list(range(200)) * 100
    read = decode(json.dumps({"new": None, "prompt": prompt}).encode(), CompletionRequest)
    assert read.prompt == prompt


# ---- whole requests, as these programs make them -------------------------------------------------------

LM_EVAL = {"model": "fake", "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
BODIES = {
    "lm-eval scores": (TEXT, {"prompt": [[97, 98], [99]], **LM_EVAL}),
    "lm-eval scores through a wrapper": (TEXT, {**LM_EVAL, "prompt_logprobs": None, "logit_bias": None}),
    "lm-eval generates": (TEXT, {"model": "fake", "temperature": 0, "seed": 1234, "max_tokens": 8,
                                 "stop": ["</s>", "\n\n", "Question:", "Q:", "<|im_end|>", "###"]}),
    "LangChain": (TEXT, {"prompt": ["ab"], "model": "fake", "n": 1, "best_of": 1, "top_p": 1, "seed": None,
                         "temperature": 0.7, "frequency_penalty": 0, "presence_penalty": 0, "logprobs": None,
                         "logit_bias": {}, "max_tokens": 4}),
    "LangChain chat, streamed": (CHAT, {"model": "fake", "n": 1, "stream": True, "temperature": 0.7,
                                        "stream_options": {"include_usage": True}, "functions": None}),
    "vllm bench": (TEXT, {"model": "fake", "max_tokens": 4, "logprobs": None, "repetition_penalty": 1.0,
                          "temperature": 0.0, "stream": True, "stream_options": {"include_usage": True},
                          "ignore_eos": True, "best_of": 1, "use_beam_search": False}),
    "vLLM's sampling parameters": (TEXT, {"n": 1, "presence_penalty": 0.0, "frequency_penalty": 0.0,
                                          "repetition_penalty": 1.0, "temperature": 1.0, "top_p": 1.0,
                                          "top_k": -1, "min_p": 0.0, "seed": None, "stop": [],
                                          "stop_token_ids": [], "bad_words": [], "ignore_eos": False,
                                          "max_tokens": 4, "min_tokens": 0, "logprobs": None,
                                          "prompt_logprobs": None, "skip_special_tokens": True,
                                          "spaces_between_special_tokens": True, "logits_processors": None,
                                          "truncate_prompt_tokens": None, "allowed_token_ids": None,
                                          "include_stop_str_in_output": False, "use_beam_search": False,
                                          "length_penalty": 1.0, "early_stopping": False}),
    "llama-server's web page": (CHAT, {"stream": True, "cache_prompt": True, "reasoning_format": "none",
                                       "temperature": 0.8, "dynatemp_range": 0, "dynatemp_exponent": 1,
                                       "top_k": 40, "top_p": 0.95, "min_p": 0.05, "typ_p": 1,
                                       "xtc_probability": 0, "xtc_threshold": 0.1, "repeat_last_n": 64,
                                       "repeat_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0,
                                       "dry_multiplier": 0, "dry_base": 1.75, "dry_allowed_length": 2,
                                       "dry_penalty_last_n": -1, "max_tokens": -1, "samplers": None,
                                       "backend_sampling": False, "timings_per_token": False}),
    "Open WebUI": (CHAT, {"model": "fake", "stream": True, "tools": [], "logit_bias": None, "user": None,
                          "stream_options": {"include_usage": True}}),
    "SillyTavern": (CHAT, {"model": "fake", "temperature": 1, "frequency_penalty": 0, "presence_penalty": 0,
                           "top_p": 1, "stream": True, "max_tokens": 20, "n": 1, "logit_bias": {},
                           "stop": [f"\n{name}:" for name in ("You", "A", "B", "C", "D", "E")]}),
    "Zed": (CHAT, {"model": "fake", "stream": True, "temperature": 1, "parallel_tool_calls": None,
                   "tools": [], "tool_choice": None, "stop": [], "max_completion_tokens": 20,
                   "prompt_cache_key": "t", "reasoning_effort": None}),
    "Continue": (TEXT, {"model": "fake", "max_tokens": 30, "temperature": 0.01, "stream": True, "suffix": "",
                        "stop": ["<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<|endoftext|>", "\n\n",
                                 "\r\n\r\n", "/src/", "#- coding: utf-8", "```"]}),
    "LibreChat": (CHAT, {"model": "fake", "user": "65f", "stream": True, "presence_penalty": 0, "top_p": 1,
                         "frequency_penalty": 0, "temperature": 1}),
    "AI SDK": (CHAT, {"model": "fake", "tool_choice": "auto", "stream": True, "max_tokens": 20,
                      "response_format": {"type": "text"}, "verbosity": None, "reasoning_effort": None}),
    "LiteLLM": (CHAT, {"model": "fake", "extra_body": None, "functions": None, "stream_options": None,
                       "metadata": {}, "service_tier": "auto", "store": False, "top_logprobs": None}),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_a_client_is_answered(client, name):
    path, body = BODIES[name]
    response = ask(client, path, **body)
    assert response.status_code == 200, response.text
    if body.get("stream"):
        chunks = events(response)
        assert chunks[-1].get("usage" if body.get("stream_options") else "choices")
    else:
        assert response.json()["choices"]


def test_usage_is_null_until_the_last_chunk_where_it_was_requested(client):
    for path in (TEXT, CHAT):
        for options, shown in (({"include_usage": True}, True), ({}, False), (None, False)):
            *chunks, last = events(ask(client, path, max_tokens=3, stream=True, stream_options=options))
            assert all(("usage" in c) == shown and c.get("usage") is None for c in chunks)
            assert bool(last.get("usage")) == shown
    options = {"include_usage": True, "continuous_usage_stats": True}
    for chunk in events(ask(client, TEXT, stream=True, stream_options=options)):
        assert chunk["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


def test_cached_tokens_are_those_that_no_answer_computed(client):
    """Cached tokens are those that no answer computed. One of a prompt's answers computes, others find."""
    engine, found = client.service.engine, iter([0, 3, 3, 2])
    submit = engine.submit

    def with_pages(requests):
        for request in requests:
            request.num_cached_tokens = next(found)
        submit(requests)

    engine.submit = with_pages
    try:
        usage = ask(client, TEXT, prompt=["abc", "abd"], n=2).json()["usage"]
    finally:
        engine.submit = submit
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0 + 2}
