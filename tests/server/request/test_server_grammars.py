"""Grammars over HTTP: refused before an answer begins, costly ones, and a system that has no more to give."""

import errno
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from server.request.test_server_errors import VALUE, check
from server.request.test_server_structured import TEXT, ask
from support.server.fake_engine import ByteCodec, FakeEngine, served


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
    """A cheap one that comes last is not the last one to be answered."""
    ask(client, TEXT, structured_outputs={"regex": "the tokenizer is read"})
    quick = "jmoe.server.request.grammars.QUICK_SECONDS"
    monkeypatch.setattr(quick, 0.03)  # a costly one here takes four times that
    done = []

    def post(name, outputs):
        ask(client, TEXT, max_tokens=1, structured_outputs=outputs)
        done.append(name)

    with ThreadPoolExecutor(7) as pool:
        costly = [{"type": "integer", "multipleOf": 20011 + 2 * k} for k in range(5)]
        jobs = [pool.submit(post, "costly", {"json": schema}) for schema in costly]
        while client.service.grammars.num_waiting < len(jobs):
            time.sleep(0.001)
        jobs += [pool.submit(post, "cheap", {"choice": [f"q{k}", "r"]}) for k in range(2)]
        for job in jobs:
            job.result()
    assert done[-1] == "costly", done


def test_without_descriptors_a_grammar_is_a_503(client, monkeypatch):
    def none(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("socket.socketpair", none)
    response = client.post(TEXT, json={"prompt": "a", "structured_outputs": {"regex": "unheard"}})
    assert "Too many open files" in check(response, 503, None, "grammars_unavailable")
    assert response.headers["retry-after"] == "1"
