"""A fake engine for the server's tests: it repeats the prompt, one token per step, on a thread of its own."""

import contextlib
import threading
import time
from collections.abc import Iterator

import numpy as np
from starlette.testclient import TestClient
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jmoe.config.counters import COUNTERS, names
from jmoe.engine.reports import EngineSnapshot, ModelFacts
from jmoe.engine.request import EngineDead, Output, QueueFull, Request, TokenLogprob
from jmoe.engine.text.detokenizer import Detokenizer
from jmoe.engine.text.token_bytes import TokenBytes
from jmoe.server.app import make_app
from jmoe.server.run import Server, bind
from jmoe.server.service import Service
from jmoe.server.settings import ServerSettings

BOS, EOS, VOCAB = 256, 257, 258


def byte_tokenizer() -> Tokenizer:
    """Returns ``ByteCodec``'s tokens as ``tokenizers`` has them, spelled as in GPT-2's vocabulary.

    Printable bytes stand for themselves, the others are characters from U+0100 on.
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [b for b in range(256) if b not in plain]
    vocabulary = {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(other)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


class ByteCodec:
    """One token a UTF-8 byte; text gets a BOS in front, as some families' tokenizers do."""

    tokenizer = byte_tokenizer()
    token_bytes = TokenBytes(tokenizer)

    def encode(self, text: str, *, special: bool = True, limit: int | None = None) -> list[int]:
        try:
            return [BOS] * special + list(text.encode())
        except UnicodeEncodeError:
            raise ValueError("text is not valid Unicode (a lone surrogate)") from None

    def decode(self, ids, *, skip_special: bool = True) -> str:
        names = {BOS: b"", EOS: b""} if skip_special else {BOS: b"<s>", EOS: b"</s>"}
        return b"".join(names.get(t, bytes([t % 256])) for t in ids).decode(errors="replace")

    def token_text(self, token_id: int) -> str:
        return self.decode([token_id], skip_special=False)


class FakeEngine:
    """An engine that repeats the prompt.

    codec, max_model_len, vocab_size, end_ids: the ``ModelFacts``.
    pace: seconds of a step.
    room: largest number of requests.
    fails_at: number of tokens at which a request fails.
    holds_at: number of tokens at which requests wait until ``going`` is set.

    A request with a constraint gets the token of the prompt if it is allowed, else the lowest allowed token.
    """

    def __init__(
        self,
        codec=None,
        max_model_len=64,
        vocab_size=VOCAB,
        end_ids=frozenset({EOS}),
        pace=0.0,
        room=1000,
        fails_at=None,
        holds_at=None,
    ):
        self.facts = ModelFacts(codec, max_model_len, vocab_size, end_ids)
        self.pace, self.room, self.fails_at, self.holds_at = pace, room, fails_at, holds_at
        self.going = threading.Event()
        self.alive, self.closing = True, False
        self.running: dict[str, Request] = {}
        self.texts: dict[str, Detokenizer] = {}
        self.seen: list[Request] = []
        self.listeners = []
        self.lock = threading.Condition()
        self.thread = threading.Thread(target=self._loop, daemon=True)
        self.thread.start()

    def submit(self, requests):
        for request in requests:
            asked, length = request.params.max_tokens or 0, len(request.prompt_token_ids)
            if length + asked > self.facts.max_model_len:
                raise ValueError(
                    f"This model's maximum context length is {self.facts.max_model_len} tokens. However, you "
                    f"requested {length + asked} tokens."
                )
            ids = request.prompt_token_ids
            if ids and (min(ids) < 0 or max(ids) >= self.facts.vocab_size):  # quick, since other threads wait
                raise ValueError("a token id is outside the vocabulary")
        with self.lock:
            if not self.alive:
                raise EngineDead("dead")
            if len(self.running) + len(requests) > self.room:
                raise QueueFull("the queue is full")
            self.seen += requests
            for request in requests:
                self.running[request.id] = request
                if self.facts.codec is not None:
                    prompt = None if request.constraint is not None else request.prompt_token_ids
                    self.texts[request.id] = Detokenizer(
                        self.facts.codec,
                        request.params.stop,
                        prompt,
                        request.markup,
                        keeps_stop=request.params.include_stop_str_in_output,
                        shows_special=not request.params.skip_special_tokens,
                    )
            self.lock.notify()

    def abort(self, request_ids):
        with self.lock:
            for id in request_ids:
                if id in self.running:
                    self._end(self.running[id], Output(id, finish_reason="abort"))

    def snapshot(self):
        return EngineSnapshot(len(self.running), 0, 0.25, self.alive, 0)

    def moe_stats(self):
        if not self.alive:
            raise EngineDead("dead")

        def layer(active: float, assignments: int) -> dict:
            sums = {
                "dropped": 5,
                "rerouted": 4,
                "remapped": 5,
                "lost_assignments": 0,
                "remote_assignments": 1,
                "transport_bytes": 600,
                "transport_useful_bytes": 400,
                "expert_cache_hits": 7,
                "expert_cache_misses": 3,
                "expert_cache_evictions": 2,
                "bytes_host_to_device": 1200,
                "prefetch_bytes": 900,
                "prefetch_useful_bytes": 300,
            }
            means = {
                "active_experts": active,
                "active_experts_baseline": 2 * active,
                "max_over_mean_load": 2.0,
            }
            given = {**means, "assignments": assignments, **sums}
            return given | {name: 0 for name in names(COUNTERS) if name not in given}

        prefill, decode = [layer(8.0, 10), layer(6.0, 10)], [layer(4.0, 2), layer(2.0, 2)]
        shape = {"layers": 2, "moe_layers": [0, 1], "experts": 4, "top_k": 2}
        return {
            "model": shape,
            "mesh": {"data": 1, "expert": 2, "tensor": 1},
            "prefill": {"steps": 1, "per_layer": prefill, "counts": [[4, 2, 2, 2], [10, 0, 0, 0]]},
            "decode": {"steps": 3, "per_layer": decode, "counts": [[2, 0, 0, 0], [0, 0, 1, 1]]},
        }

    def add_listener(self, listener):
        self.listeners.append(listener)

    def die(self):
        with self.lock:
            self.alive = False
            for request in list(self.running.values()):
                self._end(request, Output(request.id, finish_reason="error", error="the engine failed"))

    def _loop(self):
        while not self.closing:
            with self.lock:
                if not self.running:
                    self.lock.wait(0.05)
                for request in list(self.running.values()):
                    self._step(request)
            time.sleep(self.pace)

    def _step(self, request):
        params, done = request.params, len(request.token_ids)
        if done == self.holds_at and not self.going.is_set():
            return None
        request.start_time = request.start_time or time.monotonic()
        scores = None
        if done == 0 and params.prompt_logprobs is not None:
            rest = (self._score(t, params.prompt_logprobs) for t in request.prompt_token_ids[1:])
            scores = (None, *rest)
        if params.max_tokens == 0:
            return self._end(request, Output(request.id, prompt_logprobs=scores, finish_reason="length"))
        if done == self.fails_at:
            return self._end(request, Output(request.id, finish_reason="error", error="NaN logits"))
        token = self._wanted(request, done)
        if request.constraint is not None:
            try:
                token = self._allowed(request, token)
            except ValueError as error:
                return self._end(
                    request, Output(request.id, finish_reason="error", error=str(error), is_invalid=True)
                )
        request.token_ids.append(token)
        now = time.monotonic()
        request.first_token_time = request.first_token_time or now
        for listener in self.listeners:
            listener.token(request, now)
        texts = self.texts.get(request.id)
        text, finish, why = "", None, None
        if token in self.facts.end_ids and not params.ignore_eos:
            text, finish = texts.push_end(token) if texts else "", "stop"
        elif texts:
            text = texts.push(token)
        thoughts, is_thought = (texts.thoughts, texts.is_thought) if texts else ("", False)
        if texts and texts.stop_match:
            finish, why = "stop", texts.stop_match
        elif not finish and (done + 1 == params.max_tokens or request.length >= self.facts.max_model_len):
            finish = "length"
        if finish and texts and not texts.stop_match:
            text += texts.flush()
            thoughts += texts.thoughts
        logprobs = () if params.logprobs is None else (self._score(token, params.logprobs),)
        output = Output(
            request.id,
            (token,),
            text,
            thoughts,
            logprobs,
            scores,
            finish,
            why,
            num_thought_tokens=int(is_thought),
        )
        if finish:
            self._end(request, output)
        else:
            request.emit(output)

    def _end(self, request, output):
        del self.running[request.id]
        self.texts.pop(request.id, None)
        for listener in self.listeners:
            listener.finished(request, output.finish_reason)
        request.emit(output)

    def _wanted(self, request, done):
        """Returns the token at place ``done`` of an answer."""
        return request.prompt_token_ids[done % len(request.prompt_token_ids)]

    @staticmethod
    def _allowed(request, token):
        words = request.constraint.allowed()
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        token = token if token in allowed else int(allowed[0])
        request.constraint.accept(token)
        return token

    def _score(self, token, alternatives):
        """Scores the token as the second best of all; alternatives 0 and 1 must still report it."""
        size = self.facts.vocab_size
        top = [((token + 1) % size, -0.25), (token, -0.5), ((token + 2) % size, -2.0)][: max(alternatives, 0)]
        if all(t != token for t, _ in top):
            top.append((token, -0.5))
        return TokenLogprob(token, -0.5, tuple(top), 2)


TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('system must come first') }}{% endif %}"
    "{{ m['role'][0] }}:{{ m['content'] }}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


@contextlib.contextmanager
def served(engine: FakeEngine, directory=None, **changes) -> Iterator[TestClient]:
    """Runs the application in process, with its service at ``client.service``."""
    service = Service(engine, ServerSettings(**changes), directory, "fake")
    with TestClient(make_app(service), raise_server_exceptions=False) as client:
        client.service = service
        yield client
    service.executor.shutdown()
    service.grammars.close()
    engine.closing = True


@contextlib.contextmanager
def listening(engine: FakeEngine, directory=None, **changes) -> Iterator[tuple[str, Server]]:
    """Runs a real server on a free port of this machine in a thread; yields (its URL, the server)."""
    server = Server(Service(engine, ServerSettings(**changes), directory, "fake"))
    bound = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    bound.listen()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        yield url, server
    finally:
        server.ask_to_stop()
        server.ask_to_stop()
        thread.join(60)
        engine.closing = True
        assert not thread.is_alive()


def eventually(condition, seconds: float = 120.0) -> bool:
    """Waits until the condition is true and returns whether it is; ``seconds`` suffice on a busy machine."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(condition())
