"""Tests ``jmoe serve`` on the bundled model in the way of its users: the openai client over a real socket."""

import contextlib
import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

import openai
import pytest
from support.ports import own_port
from support.server.fake_engine import eventually
from support.server.processes import answers


@contextlib.contextmanager
def serving() -> Iterator[tuple[str, subprocess.Popen]]:
    """Yields (base URL, process) of a server that is ready."""
    port = own_port()
    base = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "jmoe.cli", "serve", "tiny", "--port", str(port), "--max-num-seqs", "4"]
    with subprocess.Popen([*command, "--max-num-batched-tokens", "256"]) as process:
        try:
            assert eventually(lambda: answers(base) or process.poll() is not None, 500)
            assert process.poll() is None, "the server did not become ready"
            yield base, process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def server():
    with serving() as (base, process):
        yield base, process


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="EMPTY", max_retries=0)


CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Hi, two tickets please."}],
    "max_tokens": 24,
}


def test_streamed_chat_is_the_whole_answer(client):
    whole = client.chat.completions.create(**CHAT, temperature=0.8, seed=3)
    stream = client.chat.completions.create(
        **CHAT, temperature=0.8, seed=3, stream=True, stream_options={"include_usage": True}
    )
    events = list(stream)
    text = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
    assert text == whole.choices[0].message.content and text.strip()
    assert "\n" not in text, "a turn of this model's dialogues is one line"
    for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(events[-1].usage, count) == getattr(whole.usage, count) > 0
    assert [e.usage.prompt_tokens_details.cached_tokens for e in (whole, events[-1])] == [
        0,
        whole.usage.prompt_tokens - 1,
    ], "the last token's keys and values are always computed"


def test_completions_models_and_parallel_greedy(client):
    assert [m.id for m in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    ask = {"model": "tiny", "max_tokens": 8, "temperature": 0}
    one = client.completions.create(prompt="Question: A farmer has", **ask)
    many = client.completions.create(prompt=["Question: A farmer has"] * 6, **ask)
    assert {c.text for c in many.choices} == {one.choices[0].text}


def test_echo_with_logprobs_scores_the_prompt(client):
    answer = client.completions.create(
        model="tiny", prompt="def main():", max_tokens=1, temperature=0, logprobs=1, echo=True
    )
    scores = answer.choices[0].logprobs
    assert len(scores.tokens) == answer.usage.prompt_tokens + 1
    assert scores.token_logprobs[0] is None and all(p <= 0 for p in scores.token_logprobs[1:])


def test_penalties_bad_words_and_scores_of_the_prompt(client):
    ask = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 40, "temperature": 0}

    def text(**fields) -> str:
        return client.completions.create(**ask, extra_body=fields).choices[0].text

    free = text()
    words = [word for word in free.split() if word.isalpha() and len(word) > 2]
    word = max(words, key=words.count)
    assert word in free and word not in text(bad_words=[word])
    repeated = [words.count(each) for each in set(words)]
    penalised = text(frequency_penalty=2, presence_penalty=2, repetition_penalty=1.3).split()
    assert max(map(penalised.count, set(penalised))) <= max(repeated) and penalised != free.split()
    choice = client.completions.create(**ask, extra_body={"prompt_logprobs": 2}).choices[0]
    assert choice.text == free and choice.prompt_logprobs[0] is None
    for scores in choice.prompt_logprobs[1:]:
        by_rank = sorted(scores.values(), key=lambda each: each["rank"])
        assert [each["logprob"] for each in by_rank] == sorted((e["logprob"] for e in by_rank), reverse=True)
        assert [each["rank"] for each in by_rank[:2]] == [1, 2]
    with pytest.raises(openai.BadRequestError, match=r"bad_words: 200 sequences .* limit of 128"):
        text(bad_words=[f"verylongword{i}" for i in range(100)])


def test_bad_requests_are_4xx_and_the_server_goes_on(client):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="gpt-9", prompt="x")
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model="tiny", prompt="x", max_tokens=-2)
    with pytest.raises(openai.BadRequestError, match="maximum context length is 1024 tokens"):
        client.completions.create(model="tiny", prompt="word " * 3000)
    assert client.completions.create(model="tiny", prompt="x", max_tokens=1).choices


def test_expert_counts_metrics_and_no_compilation(server, client):
    base, _ = server
    client.completions.create(model="tiny", prompt="Once", max_tokens=5)
    with urllib.request.urlopen(f"{base}/moe/stats") as answer:
        stats = json.load(answer)
    for phase in ("prefill", "decode"):
        for counts, layer in zip(stats[phase]["counts"], stats[phase]["per_layer"], strict=True):
            assert len(counts) == 32 and sum(counts) == layer["assignments"] > 0
    with urllib.request.urlopen(f"{base}/metrics") as answer:
        metrics = answer.read().decode()
    assert "jmoe_compilations_after_warmup_total 0.0" in metrics
    assert 'jmoe_moe_active_experts{layer="0"}' in metrics


def test_a_dropped_stream_frees_its_slot(server, client):
    base, _ = server
    stream = client.completions.create(model="tiny", prompt="Once", max_tokens=900, stream=True)
    next(iter(stream))
    stream.close()

    def freed() -> bool:
        with urllib.request.urlopen(f"{base}/metrics") as answer:
            return "jmoe_num_requests_running 0.0" in answer.read().decode()

    assert eventually(freed)


def test_sigterm_ends_a_stream_properly():
    """After SIGTERM the running stream is finished, then the process ends with code 0."""
    with serving() as (base, process):
        client = openai.OpenAI(base_url=f"{base}/v1", api_key="EMPTY", max_retries=0)
        stream = iter(client.completions.create(model="tiny", prompt="Once", max_tokens=200, stream=True))
        next(stream)
        process.send_signal(signal.SIGTERM)
        last = list(stream)[-1]
        assert last.choices[0].finish_reason in ("length", "stop")
        assert process.wait(timeout=120) == 0
