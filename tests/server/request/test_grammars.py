"""Tests grammars over HTTP: refusals before an answer begins, costly grammars, a system without resources."""

import errno
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.server.answers import VALUE, check
from support.server.fake_engine import ByteCodec, FakeEngine, eventually, served

from jmoe.engine.grammar.check import MAX_SECONDS, TooCostly

TEXT = "/v1/completions"


@pytest.fixture(scope="module")
def client():
    with served(FakeEngine(ByteCodec(), max_model_len=2048)) as client:
        yield client


LATE = {
    "lexer": {"regex": "a{1000000}"},
    "for ever": {"grammar": 'start: "a" start'},
    "row": {"grammar": "start: \"a\" (" + " | ".join(f'"{i}" b' for i in range(3000)) + ')\nb: "b"'},
    "objects": {"json": {"anyOf": [
        {"type": "object", "properties": {f"o{i}_{j}": {"type": "string"} for j in range(20)}}
        for i in range(50)
    ]}},
}  # fmt: skip


@pytest.mark.parametrize("outputs", LATE.values(), ids=LATE)
def test_what_fails_within_a_few_tokens_is_refused_before_the_answer_begins(client, outputs):
    body = {"prompt": "a", "max_tokens": 5, "stream": True, "structured_outputs": outputs}
    check(client.post(TEXT, json=body), 400, "structured_outputs", VALUE)


def test_costly_grammars_delay_one_another_only(client, monkeypatch):
    """Costly grammars run one at a time and delay only one another, while cheap ones are answered."""
    grammars, going, costly = client.service.grammars, threading.Event(), []
    compiled = grammars._compile

    def compile(request, seconds):
        if "multipleOf" not in request.grammar.text:
            return compiled(request, seconds)
        if seconds < MAX_SECONDS:
            raise TooCostly("for a quick thread")
        costly.append(request)
        assert going.wait(120)
        return compiled(request, seconds)

    monkeypatch.setattr(grammars, "_compile", compile)

    def post(outputs):
        body = {"prompt": "hi", "max_tokens": 1, "structured_outputs": outputs}
        assert client.post(TEXT, json=body).status_code == 200

    with ThreadPoolExecutor(7) as pool:
        schemas = [{"type": "integer", "multipleOf": 3 + 2 * k} for k in range(5)]
        jobs = [pool.submit(post, {"json": schema}) for schema in schemas]
        assert eventually(lambda: grammars.num_waiting == 5 and costly)
        for cheap in [pool.submit(post, {"choice": [f"q{k}", "r"]}) for k in range(2)]:
            cheap.result(60)
        assert len(costly) == 1 and not any(job.done() for job in jobs)
        going.set()
        for job in jobs:
            job.result(60)


def test_without_descriptors_a_grammar_is_a_503(client, monkeypatch):
    def none(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("socket.socketpair", none)
    response = client.post(TEXT, json={"prompt": "a", "structured_outputs": {"regex": "unheard"}})
    assert "Too many open files" in check(response, 503, None, "grammars_unavailable")
    assert response.headers["retry-after"] == "1"
