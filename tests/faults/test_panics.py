"""A panic of a Rust library, which is no Exception, ends the request that caused it or else the process."""

import json
import threading
import time

import numpy as np
import pytest
from support.models import hf_tiny
from support.server.fake_engine import ByteCodec, FakeEngine, served
from support.server.raw_http import events
from tokenizers import Regex, Tokenizer, decoders, models

from jmoe.engine.build import build_engine
from jmoe.engine.deployment.settings import EngineSettings
from jmoe.engine.request import EngineDead, Request, SamplingParams
from jmoe.engine.text.codec import TextCodec
from jmoe.engine.text.token_bytes import Pieces
from jmoe.engine.worker import EngineWorker
from jmoe.server.watch import poll

SIZES = {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 32}
FATAL, FINE = 7, 8
PARAMS = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)


class Panic(BaseException):
    """A panic like pyo3's PanicException, which is not an Exception."""


def strip_tokenizer() -> Tokenizer:
    """Returns a documented decoder that panics in Rust: it strips one from texts that may be empty."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "": 1}, unk_token=""))
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)])
    return tokenizer


def a_true_panic() -> None:
    strip_tokenizer().decode([1])


def panic() -> None:
    raise Panic("0xdeadbeef")


def test_a_rust_panic_is_no_exception():
    with pytest.raises(BaseException) as raised:
        a_true_panic()
    assert not isinstance(raised.value, Exception)


class Codec:
    """A codec in which every token is an x. It fails for one token in the way of ``failing``."""

    def __init__(self, failing):
        self.token_bytes = Letters(failing)


class Letters:
    """A replacement of ``TokenBytes``."""

    pieces, special_ids = Pieces({"type": "Fuse"}), frozenset()
    tokenizer = Tokenizer(models.WordLevel({"x": 0}, unk_token="x"))

    def __init__(self, failing):
        self.failing = failing

    def __call__(self, id):
        if id == FATAL:
            self.failing()
        return b"x"

    first = __call__


class Forced:
    """A grammar that allows only one token. It is open if ``is_allowed`` fails.

    fails: method at which it fails, in the way of ``failing``.
    """

    def __init__(self, token: int, words: int, fails: str = "", failing=panic):
        self.words, self.fails, self.failing = np.zeros(words, np.uint32), fails, failing
        self.is_open = fails == "is_allowed"
        self.words[token // 32] = 1 << token % 32

    def allowed(self):
        if self.fails == "allowed":
            self.failing()
        return self.words

    def is_allowed(self, token_id):
        if self.fails == "is_allowed":
            self.failing()
        return True

    def accept(self, token_id):
        if self.fails == "accept":
            self.failing()


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    hf_tiny.write_checkpoint(directory, hf_tiny.hf_config(eos_token_id=None))
    engine = build_engine(directory, EngineSettings(**SIZES), warm_up=False)
    yield engine
    engine.close()


@pytest.fixture
def running(engine):
    """Runs the engine's steps on a thread until they are to end."""
    engine.codec, engine.listeners[:] = Codec(panic), []
    worker = EngineWorker(engine)
    worker.start()
    yield worker
    engine.codec = None
    with worker._condition:
        worker._is_closing = True
        worker._condition.notify()
    worker._thread.join(60)
    assert not worker._thread.is_alive() and not engine.busy
    engine.__dict__.pop("step", None)


def request(engine, id: str, token: int = FINE, **forced) -> tuple[Request, list, threading.Event]:
    outputs, ended = [], threading.Event()

    def emit(output):
        outputs.append(output)
        if output.finish_reason is not None:
            ended.set()

    words = -(-engine.vocab_size // 32)
    made = Request(id, [1, 2, 3], PARAMS, emit, time.monotonic(), Forced(token, words, **forced))
    return made, outputs, ended


def boom() -> None:
    raise TypeError("0xdeadbeef")


def out_of_memory() -> None:
    raise MemoryError


def leave() -> None:
    raise SystemExit(3)


CULPRITS = {
    "its text": {"token": FATAL},
    "its grammar's mask": {"fails": "allowed"},
    "its grammar's step": {"fails": "accept"},
    "its grammar's look at a token": {"fails": "is_allowed"},
    "a mask that is an error": {"fails": "allowed", "failing": boom},
    "a step without memory": {"fails": "accept", "failing": out_of_memory},
    "a wish to end": {"fails": "accept", "failing": leave},
    "a true panic": {"fails": "accept", "failing": a_true_panic},
}


@pytest.mark.parametrize("culprit", CULPRITS)
def test_who_causes_a_panic_fails_alone(engine, running, culprit):
    bad, fine = request(engine, "bad", **CULPRITS[culprit]), request(engine, "fine")
    running.submit([bad[0], fine[0]])
    assert bad[2].wait(60) and fine[2].wait(60)
    assert bad[1][-1].finish_reason == "error" and "0xdeadbeef" not in bad[1][-1].error
    assert fine[0].token_ids == [FINE] * 5 and "".join(o.text for o in fine[1]) == "xxxxx"
    again = request(engine, "again")
    running.submit([again[0]])
    assert again[2].wait(60) and again[0].token_ids == [FINE] * 5 and running.snapshot().is_alive


@pytest.mark.parametrize("failing", [panic, boom, leave])
def test_a_listener_that_fails_harms_nobody_else(engine, running, failing):
    class Deaf:
        def token(self, request, now): ...
        def stepped(self, report):
            failing()

        def finished(self, request, reason):
            failing()

    running.add_listener(Deaf())
    deaf, fine = request(engine, "deaf"), request(engine, "fine")
    deaf[0].emit = lambda output: failing()
    running.submit([deaf[0], fine[0]])
    assert fine[2].wait(60) and fine[0].token_ids == [FINE] * 5 and running.snapshot().is_alive
    running.abort(["deaf"])
    late = request(engine, "late")
    running.submit([late[0]])
    assert late[2].wait(60), "a request whose end cannot be delivered ends all the same"


@pytest.mark.parametrize("kind", [Panic, SystemExit, KeyboardInterrupt, MemoryError, RuntimeError])
def test_whatever_ends_the_thread_nobody_waits_for_it(engine, running, kind):
    first, second = request(engine, "first"), request(engine, "second")
    step, fail = engine.step, threading.Event()

    def stepping():
        if fail.wait(0.01):
            raise kind
        return step()

    engine.step = stepping
    first[0].params = second[0].params = SamplingParams(max_tokens=None, temperature=0.0, ignore_eos=True)
    first[0].emit, emit = (lambda output: panic()), first[0].emit
    second[0].emit, emit = (lambda output: (emit(output), fail.set())), second[0].emit
    running.submit([first[0], second[0]])
    assert second[2].wait(60), "the failed delivery to the first does not affect the second"
    assert second[1][-1].finish_reason == "error" and second[1][-1].error.startswith("the engine failed")
    assert not running.snapshot().is_alive
    for ask in (lambda: running.submit([request(engine, "late")[0]]), running.moe_stats):
        with pytest.raises(EngineDead):
            ask()
    running.abort(["first"])


def test_a_call_that_panics_is_its_callers(engine, running, monkeypatch):
    monkeypatch.setattr(engine, "moe_stats", panic)
    with pytest.raises(Exception, match="Panic"):
        running.moe_stats()
    assert running.snapshot().is_alive


# ---- in the server -----------------------------------------------------------------------------------


class Words(ByteCodec):
    """A codec that panics at an exclamation mark."""

    def __init__(self, failing):
        self.failing = failing

    def encode(self, text, *, special=True, limit=None):
        if "!" in text:
            self.failing()
        return super().encode(text, special=special, limit=limit)

    def token_text(self, token_id):
        if token_id == ord("?"):
            self.failing()
        return super().token_text(token_id)

    def decode(self, ids, *, skip_special=True):
        if ord("!") in ids:
            self.failing()
        return super().decode(ids, skip_special=skip_special)


BODIES = {
    "encode": ("/v1/completions", {"prompt": "a!"}),
    "tokenize": ("/tokenize", {"prompt": "a!"}),
    "detokenize": ("/detokenize", {"tokens": [33]}),
    "echo": ("/v1/completions", {"prompt": [33], "echo": True, "max_tokens": 0}),
    "logprobs": ("/v1/completions", {"prompt": "a?", "max_tokens": 4, "logprobs": 1}),
}


@pytest.mark.parametrize("failing", [panic, a_true_panic, leave])
@pytest.mark.parametrize("case", BODIES)
def test_a_panic_in_a_handler_is_a_500_in_the_envelope(case, failing):
    path, body = BODIES[case]
    with served(FakeEngine(Words(failing))) as client:
        answer = client.post(path, json=body)
        assert answer.status_code == 500 and answer.headers["content-type"] == "application/json"
        error = answer.json()["error"]
        assert error["code"] == "internal_error" and "deadbeef" not in error["message"]
        assert client.get("/live").status_code == 200
        assert client.post("/v1/completions", json={"prompt": "ab", "max_tokens": 2}).status_code == 200


FAILING_TOKENIZERS = {
    "no tokens": (("/detokenize", {"tokens": []}), "tokens", decoders.Fuse()),
    "an empty token": (("/detokenize", {"tokens": [1]}), "tokens", decoders.Fuse()),
    "a token's name": (
        ("/tokenize", {"prompt": "b", "return_token_strs": True}),
        "return_token_strs",
        decoders.Replace(Regex("b"), ""),
    ),
}


@pytest.mark.parametrize("case", FAILING_TOKENIZERS)
def test_what_a_tokenizer_cannot_do_is_a_400_that_says_so(tmp_path, case):
    (path, body), field, first = FAILING_TOKENIZERS[case]
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "": 1, "b": 2}, unk_token=""))
    tokenizer.decoder = decoders.Sequence([first, decoders.Strip(" ", 0, 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with served(FakeEngine(TextCodec(tmp_path, 258))) as client:
        answer = client.post(path, json=body)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] == field and error["message"].startswith("the tokenizer cannot decode")
        assert client.post("/detokenize", json={"tokens": [0]}).json() == {"prompt": "a"}


@pytest.mark.parametrize("failing", [panic, a_true_panic, leave])
def test_a_panic_in_a_stream_is_its_last_event(failing):
    body = {"prompt": "ab?", "max_tokens": 9, "logprobs": 1, "stream": True, "add_special_tokens": False}
    with served(FakeEngine(Words(failing))) as client:
        sent = events(client.post("/v1/completions", json=body).content)
        assert [e["choices"][0]["text"] for e in sent[:-1]] == ["a", "b"]
        assert sent[-1]["error"]["type"] == "server_error" and not client.service.engine.running


@pytest.mark.parametrize("failing", [panic, boom])
def test_an_observer_that_fails_changes_no_answer(failing, caplog):
    with served(FakeEngine(ByteCodec())) as client:
        client.service.observers.insert(0, lambda answered: failing())
        answer = client.post("/v1/completions", json={"prompt": "ab", "max_tokens": 2})
        assert answer.json()["choices"][0]["text"] == "ab" or answer.status_code == 200
        counted = client.get("/metrics").text
    assert 'handler="/v1/completions"' in counted, "the observers after it are still called"
    assert "0xdeadbeef" in caplog.text


def test_sampling_that_fails_is_reported_and_tried_again(monkeypatch):
    monkeypatch.setattr(poll, "PERIOD", 0.05)
    with served(FakeEngine(ByteCodec())) as client:
        service = client.service
        take, service.poll.take = service.poll.take, panic
        failed = client.get("/moe/stats?window=1")
        assert failed.status_code == 500 and failed.json()["error"]["code"] == "internal_error"
        service.poll.take = take
        assert client.get("/moe/stats?window=1").status_code == 200, "the next look begins anew"
        assert json.loads(client.get("/moe/stats").content)["model"]["experts"] == 4


def test_who_interrupts_a_program_ends_it(engine):
    """An interrupt in the main thread, where Python callers run the engine, is no request's fault."""

    def interrupt():
        raise KeyboardInterrupt

    engine.codec = Codec(interrupt)
    bad = request(engine, "bad", FATAL)
    with pytest.raises(KeyboardInterrupt):
        engine.run([bad[0]])
    engine.give_up("abort", "interrupted")
    engine.codec = None
    assert bad[1][-1].finish_reason == "abort" and not engine.busy
