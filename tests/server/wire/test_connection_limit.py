"""Tests how many connections and descriptors clients may hold."""

import asyncio
import contextlib
import json
import socket

import pytest
from support.server.fake_engine import ByteCodec, FakeEngine, eventually
from support.server.loop_watch import served_here
from support.server.processes import PROGRAM, answers, process
from support.server.raw_http import ask, connected, head, post, until_closed

from jmoe.server.routes.table import ROUTES
from jmoe.server.wire import connection_limit
from jmoe.server.wire.connection_limit import ConnectionLimit

PATH = "/v1/completions"
SMALL = {"prompt": "ab", "max_tokens": 2}


def engine() -> FakeEngine:
    return FakeEngine(ByteCodec(), max_model_len=4096)


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
