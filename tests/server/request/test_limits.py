"""Tests how much one client may hold of what all need: connections, descriptors, memory, time."""

import asyncio
import contextlib
import json
import socket
import time

import pytest
from support.server.fake_engine import ByteCodec, FakeEngine, eventually, listening
from support.server.loop_watch import served_here, unheld
from support.server.processes import PROGRAM, answers, process
from support.server.raw_http import ask, connected, head, parsed, post

from jmoe.server.request.bounds import LIGHT
from jmoe.server.routes.table import ROUTES
from jmoe.server.wire import connection_limit
from jmoe.server.wire.connection_limit import ConnectionLimit

PATH = "/v1/completions"
SMALL = {"prompt": "ab", "max_tokens": 2}
CHUNKED = "Transfer-Encoding: chunked\r\n"


def engine() -> FakeEngine:
    return FakeEngine(ByteCodec(), max_model_len=4096)


async def until_closed(reader: asyncio.StreamReader) -> bytes:
    got = b""
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while part := await reader.read(65536):
            got += part
    return got


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


def test_beyond_the_limit_only_probes_are_answered(caplog):
    """If three slow bodies hold all places, only probes are answered.

    A fourth request is refused, the server's health is still reported, and an idle connection gives its place
    to a new one.
    """
    paths = [route.path.encode() for route in ROUTES if route.is_probe]

    async def run():
        async with served_here(engine(), connection_limit=ConnectionLimit(3, 2)) as (port, server):
            async with contextlib.AsyncExitStack() as stack:

                async def enter(request: bytes):
                    reader, writer = await stack.enter_async_context(connected(port))
                    writer.write(request)
                    return reader, writer

                idle, _ = await enter(b"")
                busy = [await enter(head(PATH, 10)) for _ in range(3)]
                assert await asyncio.wait_for(until_closed(idle), 60) == b"", "the idle one gave way"
                refused = await ask(port, post(PATH, SMALL))
                probes = [await ask(port, b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path) for path in paths]
                for _ in range(20):
                    await enter(b"")  # these clients then send nothing
                while len(server.server_state.connections) > 5:
                    await asyncio.sleep(0.01)
                busy[0][1].transport.abort()
                status = 503
                while status != 200:  # until the silent clients were closed
                    await asyncio.sleep(0.05)
                    with contextlib.suppress(ConnectionError, IndexError):
                        status, _ = await ask(port, post(PATH, SMALL))
            return refused, probes

    refused, probes = asyncio.run(asyncio.wait_for(run(), 120))
    assert refused[0] == 503 and json.loads(refused[1])["error"]["code"] == "too_many_connections"
    assert [status for status, _ in probes] == [200] * 4
    assert caplog.text.count("3 connections") == 1


FEW = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
{PROGRAM}
"""


def test_without_descriptors_health_is_still_reported(tmp_path):
    """Without descriptors, health is still reported: here 200 bodies that do not end share 64 descriptors."""
    log = tmp_path / "log"
    with log.open("wb") as file, process(log=file, program=FEW) as (_, url):
        with contextlib.ExitStack() as stack:
            for _ in range(200):
                address = ("127.0.0.1", int(url.rpartition(":")[2]))
                client = stack.enter_context(socket.create_connection(address, timeout=60))
                with contextlib.suppress(ConnectionError):
                    client.sendall(head(PATH, 10))
            assert eventually(lambda: answers(url))
        assert eventually(lambda: answers(url))
    text = log.read_text()
    assert text.count("connections: new ones") <= 2 and "Traceback" not in text


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


@pytest.mark.parametrize(
    ("soft", "hard", "raised"), [(64, 64, 64), (256, 4096, 4096), (1024, -1, 65536), (-1, -1, 65536)]
)
def test_as_many_descriptors_as_the_system_allows(monkeypatch, soft, hard, raised):
    """The server uses as many descriptors as the system allows, and keeps some back at any limit.

    A limit of -1 means that there is no limit.
    """
    given = []
    monkeypatch.setattr(connection_limit.resource, "getrlimit", lambda which: (soft, hard))
    monkeypatch.setattr(connection_limit.resource, "setrlimit", lambda which, limits: given.append(limits))
    monkeypatch.setattr(connection_limit, "open_descriptors", lambda: 20)
    made = ConnectionLimit.from_descriptors()
    assert given == ([(raised, hard)] if soft != -1 and soft < raised else [])
    assert (
        made.max_connections == min(10_000, raised - 20 - min(max(raised // 8, 24), 512))
        and made.num_spare >= 4
    )


def test_a_limit_that_cannot_be_raised_is_kept(monkeypatch):
    def refuse(which, limits):
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(connection_limit.resource, "getrlimit", lambda which: (256, 4096))
    monkeypatch.setattr(connection_limit.resource, "setrlimit", refuse)
    assert connection_limit.raise_descriptors() == 256
