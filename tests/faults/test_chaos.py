"""Many clients come at once, most of them bad. After them nothing is left.

The good clients got exactly what they get from a server that has no other clients.
"""

import asyncio
import dataclasses
import gc
import json
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.server.fake_engine import eventually, listening
from support.server.raw_http import ask, connected, events, post

from jmoe.engine.build import build_engine
from jmoe.engine.deployment.settings import EngineSettings
from jmoe.engine.request import Request
from jmoe.engine.worker import EngineWorker
from jmoe.server.answer.generation import Generation

PATH = "/v1/completions"
AT_ONCE = 24
TEXTS = [
    "Once upon a time there was a",
    "def main():\n    print(",
    "Question: A farmer has 12 sheep and",
    "It was the best of times, it was " * 6,
    "1, 2, 3, 4,",
]
BAD = [
    (b"{", 400),
    (b"[" * 5000, 400),
    ({"prompt": "x", "temperature": 5}, 400),
    ({"prompt": "x", "model": "another"}, 404),
    ({"prompt": ["x", []]}, 400),
    ({"prompt": [10**6]}, 400),
    ({"prompt": "word " * 400}, 400),
    ({"prompt": "x", "n": 0}, 400),
    ({"prompt": "x", "unknown": 1}, 400),
    ({"prompt": "\ud800"}, 400),
]


def question(rng: random.Random) -> dict[str, Any]:
    texts = rng.sample(TEXTS, rng.choice([1, 1, 1, 2, 3]))
    return {
        "prompt": texts[0] if len(texts) == 1 else texts,
        "n": rng.choice([1, 1, 1, 2]),
        "max_tokens": rng.choice([1, 4, 12, 24]),
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


def whole_ids(body: bytes) -> list[list[int]]:
    return [choice["token_ids"] for choice in json.loads(body)["choices"]]


def streamed_ids(body: bytes) -> list[list[int]]:
    by_choice: dict[int, list[int]] = {}
    for event in events(body):
        for choice in event["choices"]:
            by_choice.setdefault(choice["index"], []).extend(choice["token_ids"])
    return [by_choice[i] for i in range(len(by_choice))]


@dataclass
class Chaos:
    """Clients of every kind on one port.

    port: port of the server.
    rng: source of random numbers.
    quiet: answer to each question on an idle server.
    """

    port: int
    rng: random.Random
    quiet: dict[str, list[list[int]]]

    def expected(self, asked: dict[str, Any]) -> list[list[int]]:
        texts = [asked["prompt"]] if isinstance(asked["prompt"], str) else asked["prompt"]
        return [self.quiet[t][0][: asked["max_tokens"]] for t in texts for _ in range(asked["n"])]

    async def whole(self, asked: dict[str, Any]) -> None:
        status, body = await ask(self.port, post(PATH, asked))
        assert status == 200, body
        assert whole_ids(body) == self.expected(asked)

    async def stream(self, asked: dict[str, Any]) -> None:
        status, body = await ask(self.port, post(PATH, asked | {"stream": True}))
        assert status == 200, body
        assert streamed_ids(body) == self.expected(asked)

    async def slow_reader(self, asked: dict[str, Any]) -> None:
        request = post(PATH, asked | {"stream": True, "max_tokens": 4})
        status, body = await ask(self.port, request, sip=1)
        assert (status, streamed_ids(body)) == (200, self.expected(asked | {"max_tokens": 4}))

    async def no_reader(self, asked: dict[str, Any]) -> None:
        async with connected(self.port, buffer=4096) as (_, writer):
            writer.transport.pause_reading()
            writer.write(post(PATH, asked | {"stream": True, "max_tokens": 64}))
            await asyncio.sleep(self.rng.uniform(0, 0.5))

    async def leaves_while_streamed_to(self, asked: dict[str, Any]) -> None:
        async with connected(self.port) as (reader, writer):
            writer.write(post(PATH, asked | {"stream": True, "max_tokens": 200}))
            for _ in range(self.rng.randint(0, 8)):
                await reader.readline()

    async def leaves_before_the_answer(self, asked: dict[str, Any]) -> None:
        async with connected(self.port) as (_, writer):
            writer.write(post(PATH, asked | {"max_tokens": 200}))
            await asyncio.sleep(self.rng.uniform(0, 0.2))

    async def leaves_while_it_sends(self, asked: dict[str, Any]) -> None:
        request = post(PATH, asked)
        async with connected(self.port) as (_, writer):
            writer.write(request[: self.rng.randrange(len(request))])
            await asyncio.sleep(self.rng.uniform(0, 0.05))

    async def bad(self, asked: dict[str, Any]) -> None:
        sent, want = self.rng.choice(BAD)
        status, body = await ask(self.port, post(PATH, sent))
        assert status == want and set(json.loads(body)["error"]) == {"message", "type", "param", "code"}

    async def looks_in(self, asked: dict[str, Any]) -> None:
        for path in ("/metrics", "/moe/stats", "/ready"):
            request = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
            assert (await ask(self.port, request.encode()))[0] == 200

    async def run(self, count: int) -> Counter[str]:
        kinds = [self.whole, self.stream, self.slow_reader, self.no_reader, self.leaves_while_streamed_to]
        kinds += [self.leaves_before_the_answer, self.leaves_while_it_sends, self.bad, self.looks_in]
        room, met = asyncio.Semaphore(AT_ONCE), Counter()
        jobs = [(kinds[i % len(kinds)], question(self.rng)) for i in range(count)]
        self.rng.shuffle(jobs)

        async def one(kind, asked) -> None:
            async with room:
                await asyncio.wait_for(kind(asked), 300)
                met[kind.__name__] += 1

        await asyncio.gather(*(one(*job) for job in jobs))
        return met


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[int, EngineWorker, Any]]:
    """Yields (port, worker, server) of the bundled model in float32. It has fewer seats than users."""
    settings = EngineSettings(
        dtype="float32", max_model_len=256, max_num_seqs=8, max_num_batched_tokens=64, max_queue=500
    )
    engine = build_engine("tiny", settings)
    worker = EngineWorker(engine)
    worker.start()
    worker.closing = False  # type: ignore[attr-defined]  # what ``listening`` sets on a fake
    with listening(worker, write_timeout=0.3) as (url, server):
        yield int(url.rpartition(":")[2]), worker, server
    worker.close()


@pytest.fixture(scope="module")
def quiet(served) -> dict[str, list[list[int]]]:
    """Returns the longest greedy continuation of each text, requested one at a time.

    A shorter continuation is the beginning of the longest one.
    """
    asked = {"max_tokens": 24, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return {
        text: whole_ids(asyncio.run(ask(served[0], post(PATH, asked | {"prompt": text})))[1])
        for text in TEXTS
    }


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident() -> int:
    gc.collect()
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def threads() -> set[threading.Thread]:
    """Returns all threads except those of the pool, which are bounded and kept."""
    return {t for t in threading.enumerate() if not t.name.startswith("jmoe-server")}


def remembered() -> int:
    """Counts requests and answers to which anything still refers: engine, metrics, server, a lost task."""
    gc.collect()
    return sum(isinstance(o, Request | Generation) for o in gc.get_objects())


def tasks(server: Any) -> int:
    """Counts the tasks of the server's requests, one a request."""
    return len(server.server_state.tasks)


def check_idle(worker: EngineWorker, server: Any) -> None:
    """Checks that nothing runs, waits, is held or is remembered."""

    def idle() -> bool:
        s = worker.snapshot()
        return (s.num_running, s.num_waiting, s.kv_usage) == (0, 0, 0.0) and not server.service.generations

    assert eventually(idle), (worker.snapshot(), server.service.generations)
    assert eventually(lambda: not tasks(server) and not server.server_state.connections)
    assert worker.snapshot().is_alive and worker.snapshot().compilations_after_warmup == 0


def storm(served, quiet, count: int, seed: int) -> int:
    """Returns the bytes by which memory grew in the second half of ``count`` requests."""
    port, worker, server = served
    rng = random.Random(seed)
    threads_before = threads()
    asyncio.run(Chaos(port, rng, quiet).run(AT_ONCE))  # makes what stays: threads, caches
    check_idle(worker, server)
    files, objects, grown = descriptors(), remembered(), []
    for _ in range(2):
        before = resident()
        met = asyncio.run(Chaos(port, rng, quiet).run(count // 2))
        check_idle(worker, server)
        grown.append(resident() - before)
        assert len(met) == 9 and met.total() == count // 2, "every kind of client came"
    assert eventually(lambda: descriptors() <= files), (descriptors(), files)
    assert remembered() <= objects
    assert eventually(lambda: threads() <= threads_before), threads() - threads_before
    return grown[1]


def test_a_storm_leaves_nothing(served, quiet):
    assert storm(served, quiet, 150, seed=1) < 64 << 20, objects


@pytest.mark.matrix
def test_a_thousand_requests_of_every_kind(served, quiet):
    start = time.monotonic()
    grown = storm(served, quiet, 1000, seed=2)
    print(
        f"1000 requests in {time.monotonic() - start:.0f} s, {grown / 2**20:.1f} MiB grown in the second half"
    )
    assert grown < 32 << 20, objects


def test_a_full_queue_takes_exactly_what_it_has_room_for(served, quiet, monkeypatch):
    """If eight requests have the seats and four may wait, eight of twelve more are refused.

    The refusal comes at once and names a time.
    """
    port, worker, server = served
    scheduler = worker._engine.scheduler
    monkeypatch.setattr(scheduler, "limits", dataclasses.replace(scheduler.limits, max_queue=4))
    step, going = worker._engine.step, threading.Event()

    def stepping() -> bool:
        """Makes only first tokens and takes seats until all have come. No answer continues before that."""
        begins = scheduler.waiting and len(scheduler.running) < 8
        if going.is_set() or begins or any(not r.token_ids for r in scheduler.running):
            return step()
        time.sleep(0.01)
        return False

    monkeypatch.setattr(worker._engine, "step", stepping)
    long = {"prompt": TEXTS[0], "max_tokens": 200, "temperature": 0, "ignore_eos": True, "stream": True}

    async def storm() -> list[tuple[int, bytes]]:
        async with AsyncExitStack() as seats:
            for _ in range(8):
                reader, writer = await seats.enter_async_context(connected(port))
                writer.write(post(PATH, long))
                await reader.readuntil(b"data: ")
            assert worker.snapshot().num_running == 8
            waiting = [
                asyncio.create_task(ask(port, post(PATH, long | {"max_tokens": 2}))) for _ in range(12)
            ]
            while sum(task.done() for task in waiting) < 8 or worker.snapshot().num_waiting < 4:
                await asyncio.sleep(0.02)
            pair = await ask(port, post(PATH, long | {"n": 2}))
            assert pair[0] == 503, "two find no room for one either"
        going.set()
        return [await task for task in waiting]  # now the seats are free again

    results = asyncio.run(asyncio.wait_for(storm(), 120))
    assert sorted(status for status, _ in results) == [200] * 4 + [503] * 8
    refusals = [json.loads(body)["error"]["code"] for status, body in results if status == 503]
    assert set(refusals) == {"queue_full"}
    check_idle(worker, server)
