"""Tests how much one client may hold of what all need: memory, time, and what the system lacks."""

import asyncio
import contextlib
import json
import time

import pytest
from support.server.fake_engine import ByteCodec, FakeEngine, listening
from support.server.loop_watch import served_here, unheld
from support.server.raw_http import ask, connected, head, parsed, post, until_closed

from jmoe.server.request.bounds import LIGHT

PATH = "/v1/completions"
SMALL = {"prompt": "ab", "max_tokens": 2}
CHUNKED = "Transfer-Encoding: chunked\r\n"


def engine() -> FakeEngine:
    return FakeEngine(ByteCodec(), max_model_len=4096)


async def refusal(port: int, request: bytes) -> tuple[int, bytes]:
    """Sends a request like ``ask``, but the answer and the end may come before all of it was sent."""
    async with connected(port) as (reader, writer):
        writer.write(request)
        return parsed(await until_closed(reader))


async def trickle(writer: asyncio.StreamWriter, byte: bytes = b" ") -> None:
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while not writer.is_closing():
            writer.write(byte)
            await writer.drain()
            await asyncio.sleep(0.05)


async def slow(port: int, request: bytes, byte: bytes = b" ") -> tuple[float, bytes]:
    """Returns the seconds until the server ends a request whose body never ends, and the answer."""
    start = time.monotonic()
    async with connected(port) as (reader, writer):
        writer.write(request)
        sender = asyncio.create_task(trickle(writer, byte))
        got = await asyncio.wait_for(until_closed(reader), 60)
        sender.cancel()
    return time.monotonic() - start, got


SLOW = {
    "of a length": (head(PATH, 1000), b" ", 408),
    "in chunks": (head(PATH, None, CHUNKED), b"1\r\n \r\n", 408),
    "already answered": (head("/nowhere", 1000).replace(b"Connection: close\r\n", b""), b" ", 404),
    "of a request that takes none": (
        head("/live", 1000).replace(b"POST", b"GET").replace(b"Connection: close\r\n", b""), b" ", 200
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SLOW)
def test_a_body_that_never_ends_is_let_go(case):
    request, byte, status = SLOW[case]
    patience = 10 if status == 408 else 0.4  # if the body has its own time limit, the head has enough time

    async def run():
        async with served_here(engine(), body_timeout=0.4, header_timeout=patience) as (port, server):
            took, got = await slow(port, request, byte)
            assert not server.service.bodies.num_bytes
            return took, got

    took, got = asyncio.run(run())
    assert took > 0.3 and parsed(got)[0] == status


def chunked(count: int, size: int) -> bytes:
    return head(PATH, None, CHUNKED) + (b"%x\r\n%s\r\n" % (size, b" " * size)) * count


def test_a_million_tiny_chunks_are_refused_and_take_no_time():
    async def run():
        async with served_here(engine()) as (port, _):
            status, body = await unheld(lambda: refusal(port, chunked(100_000, 1)))
            small = await ask(port, chunked(5000, 20) + b"0\r\n\r\n")
            few = json.dumps(SMALL).encode()
            bytewise = b"".join(b"1\r\n%c\r\n" % byte for byte in few)
            fine = await ask(port, head(PATH, None, CHUNKED) + bytewise + b"0\r\n\r\n")
            return status, json.loads(body)["error"], json.loads(small[1])["error"], fine[0]

    status, error, small, fine = asyncio.run(run())
    assert (status, error["code"]) == (400, "invalid_http") and "chunks" in error["message"]
    assert small["code"] == "invalid_json" and "chunks" not in small["message"], "5000 small ones are read"
    assert fine == 200


def test_bodies_in_memory_are_bounded():
    big = post(PATH, SMALL | {"user": "x" * 100_000})

    async def run():
        async with served_here(engine(), max_body_bytes=120_000) as (port, server):
            server.service.bodies.limit = 250_000
            async with contextlib.AsyncExitStack() as stack:
                for _ in range(2):
                    _, writer = await stack.enter_async_context(connected(port))
                    writer.write(big[:-1])
                while server.service.bodies.num_bytes < 200_000:
                    await asyncio.sleep(0.01)
                refused = await refusal(port, big)
                small = await ask(port, post(PATH, SMALL | {"user": "x" * (LIGHT // 2)}))
            while server.service.bodies.num_bytes:
                await asyncio.sleep(0.01)
            return refused, small, await ask(port, big)

    refused, small, after = asyncio.run(run())
    assert refused[0] == 503 and json.loads(refused[1])["error"]["code"] == "bodies_full"
    assert small[0] == 200 and after[0] == 200


def test_what_the_system_lacks_is_a_503():
    """If the system lacks a resource, the answer is a 503. Here the process of a grammar cannot start."""
    with listening(engine()) as (url, server):

        def lacking(grammar, seconds):
            raise OSError(24, "Too many open files")

        server.service.grammars._compile = lacking
        body = SMALL | {"structured_outputs": {"regex": "a"}}
        status, answer = asyncio.run(ask(int(url.rpartition(":")[2]), post(PATH, body)))
    assert status == 503 and json.loads(answer)["error"]["code"] == "no_resources"


def test_uptime_does_not_follow_a_clock_that_is_set(monkeypatch):
    began = time.monotonic()
    with listening(engine()) as (_, server):
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now - 1e6)
        assert 0 <= server.service._state()["uptime_s"] <= time.monotonic() - began
