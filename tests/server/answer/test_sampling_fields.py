"""Tests the fields of sampling that other servers' clients send: what reaches the engine, and the answers."""

import json

import pytest
from support.server.answers import events
from support.server.fake_engine import BOS, EOS, TEMPLATE, ByteCodec, FakeEngine, served

USER = [{"role": "user", "content": "ab"}]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    tokenizer = {"chat_template": TEMPLATE, "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with served(FakeEngine(ByteCodec()), directory=directory) as client:
        yield client


def ask(client, path: str = "completions", **body) -> dict:
    default = {"prompt": "abcd"} if path == "completions" else {"messages": USER}
    response = client.post(f"/v1/{path}", json={"model": "fake", "temperature": 0, **default, **body})
    assert response.status_code == 200, response.text
    return response.json()


def text(client, **body) -> str:
    whole = ask(client, **body)["choices"][0]["text"]
    response = client.post(
        "/v1/completions", json={"model": "fake", "prompt": "abcd", "stream": True, **body}
    )
    parts = [chunk["choices"][0]["text"] for chunk in events(response) if chunk["choices"]]
    assert "".join(parts) == whole
    return whole


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_the_engine_gets_what_the_request_says(client, path: str):
    given = {"frequency_penalty": 0.5, "presence_penalty": -2, "repetition_penalty": 1.1,
             "allowed_token_ids": [97, 99], "bad_words": ["x", " y"], "prompt_logprobs": 3,
             "include_stop_str_in_output": True, "skip_special_tokens": False}  # fmt: skip
    ask(client, path, **given, max_tokens=2)
    params = client.service.engine.seen[-1].params
    for name, value in given.items():
        assert getattr(params, name) == (tuple(value) if isinstance(value, list) else value)
    ask(client, path, repeat_penalty=1.5, repeat_last_n=-1, max_tokens=2)
    assert client.service.engine.seen[-1].params.penalties == (1.5, 0, 0)
    ask(client, path, max_tokens=2)
    params = client.service.engine.seen[-1].params
    assert not params.has_penalties and (params.allowed_token_ids, params.bad_words) == (None, ())


def test_the_stop_string_stays_if_it_is_wanted(client):
    stop = {"stop": "cd", "max_tokens": 9}
    assert text(client, **stop) == "ab"
    assert text(client, **stop, include_stop_str_in_output=True) == "abcd"
    choice = ask(client, **stop, include_stop_str_in_output=True)["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "cd")


def test_special_tokens_have_a_text_if_they_are_wanted(client):
    ids = {"prompt": [97, BOS, 98], "max_tokens": 3}
    assert text(client, **ids) == "ab"
    assert text(client, **ids, skip_special_tokens=False) == "a<s>b"
    scored = ask(client, **ids, skip_special_tokens=False, logprobs=0)["choices"][0]["logprobs"]
    assert scored["text_offset"] == [0, 1, 4]
    assert text(client, **ids, skip_special_tokens=False, stop="s>b") == "a<"


@pytest.mark.parametrize(
    ("body", "want"),
    [
        ({"truncate_prompt_tokens": 2}, [99, 100]),
        ({"truncate_prompt_tokens": 2, "truncation_side": "right"}, [BOS, 97]),
        ({"truncate_prompt_tokens": 9}, [BOS, 97, 98, 99, 100]),
        ({"truncate_prompt_tokens": 3, "prompt": [1, 2, 3, 4]}, [2, 3, 4]),
        ({"truncate_prompt_tokens": -1, "prompt": [*range(200)], "max_tokens": 4}, [*range(140, 200)]),
        ({"truncate_prompt_tokens": -1, "prompt": "a" * 200, "max_tokens": -1}, [97] * 63),
    ],
    ids=str,
)
def test_a_prompt_is_cut_to_its_last_tokens(client, body: dict, want: list[int]):
    answer = ask(client, **{"max_tokens": 1} | body)
    assert client.service.engine.seen[-1].prompt_token_ids == want
    assert answer["usage"]["prompt_tokens"] == len(want)


def test_a_prompt_that_is_cut_is_bounded_before_it_is_tokenized(client):
    body = {"prompt": "x" * (2**21 + 1), "truncate_prompt_tokens": 1}
    error = client.post("/v1/completions", json=body).json()["error"]
    assert error["param"] == "prompt" and "2097153 characters; the limit is 2097152" in error["message"]


def test_the_echo_of_a_cut_prompt_is_what_is_left(client):
    choice = ask(client, truncate_prompt_tokens=2, echo=True, logprobs=0, max_tokens=1)["choices"][0]
    assert choice["text"] == "cdc" and choice["logprobs"]["text_offset"] == [0, 1, 2]


def test_scores_of_the_prompt_have_the_form_of_vllm(client):
    """The fake engine scores each token as the second best, with -0.5."""
    [choice] = ask(client, prompt=[97, 98, EOS], prompt_logprobs=1, max_tokens=1)["choices"]
    best = {"logprob": -0.25, "rank": 1}
    assert choice["logprobs"] is None and choice["prompt_logprobs"] == [
        None,
        {"98": {"logprob": -0.5, "rank": 2, "decoded_token": "b"}, "99": best | {"decoded_token": "c"}},
        {"257": {"logprob": -0.5, "rank": 2, "decoded_token": "</s>"}, "0": best | {"decoded_token": "\0"}},
    ]
    assert [*choice["prompt_logprobs"][1]] == ["98", "99"], "the token itself comes first"
    answer = ask(client, "chat/completions", prompt_logprobs=0, max_tokens=1, n=2)
    tokens = client.service.engine.seen[-1].prompt_token_ids
    assert [[*each] for each in answer["prompt_logprobs"][1:]] == [[str(token)] for token in tokens[1:]]
    assert "prompt_logprobs" not in ask(client, "chat/completions", max_tokens=1)


def test_an_echo_beside_scores_has_its_own_number_of_alternatives(client):
    both = {"prompt": [97, 98], "echo": True, "max_tokens": 1}
    [alone] = ask(client, **both, logprobs=0)["choices"]
    [choice] = ask(client, **both, logprobs=0, prompt_logprobs=2)["choices"]
    assert choice["logprobs"] == alone["logprobs"] and len(choice["prompt_logprobs"][1]) == 2
