"""Hostile and broken clients on a real socket meet every limit, and the engine becomes free again."""

import asyncio
import contextlib
import json
import os
import re
import socket
import threading
import time

import httpx
import pytest
from support.server.fake_engine import ByteCodec, FakeEngine, eventually, listening
from support.server.processes import process, resident
from support.server.raw_http import ask, connected, events, head, parsed, post

from jmoe.server.settings import ServerSettings
from jmoe.server.wire import middleware

PATH = "/v1/completions"
SMALL = {"prompt": "ab", "max_tokens": 2}
CHUNKED = "Transfer-Encoding: chunked\r\n"


@pytest.fixture(scope="module")
def server():
    """Yields (port, engine, server). The limits are the defaults of a user."""
    engine = FakeEngine(ByteCodec(), max_model_len=4096, pace=0.001)
    with listening(engine) as (url, server):
        yield int(url.rpartition(":")[2]), engine, server


@pytest.fixture(scope="module")
def hasty():
    """Yields the port of a server that waits half a second for what does not come."""
    with listening(FakeEngine(ByteCodec()), header_timeout=0.5, body_timeout=0.5) as (url, _):
        yield int(url.rpartition(":")[2])


def answer(port: int, *parts: bytes) -> bytes:
    """Returns what comes back until the end of the connection or of an answer."""
    got = b""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # refused before all was sent
            for part in parts:
                connection.sendall(part)
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                got += part
    return got


def refusal(raw: bytes) -> tuple[int, str]:
    """Returns (status, code) of an answer in the envelope, and checks that it closes the connection."""
    status, body = parsed(raw)
    assert b"connection: close" in raw.lower()
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return status, error["code"]


START = b"GET /live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
BAD_HEADS = {
    "one long field": (START + b"x: " + b"a" * 70_000 + b"\r\n\r\n", (431, "head_too_large")),
    "many fields": (START + b"a: b\r\n" * 101 + b"\r\n", (431, "head_too_large")),
    "a million fields": (START + b"a: b\r\n" * 1_000_000 + b"\r\n", (431, "invalid_http")),
    "no host": (b"GET /live HTTP/1.1\r\n\r\n", (400, "invalid_http")),
    "two lengths": (head(PATH, 5, "Content-Length: 6\r\n") + b"{}", (400, "invalid_http")),
    "length and chunks": (head(PATH, 5, CHUNKED) + b"0\r\n\r\n", (400, "invalid_http")),
    "coded twice": (head(PATH, None, "Transfer-Encoding: gzip, chunked\r\n"), (400, "invalid_http")),
    "negative length": (head(PATH, -5), (400, "invalid_http")),
    "a length in words": (head(PATH, None, "Content-Length: 1e3\r\n"), (400, "invalid_http")),
    "bad chunk": (head(PATH, None, CHUNKED) + b"ZZ\r\n", (400, "invalid_http")),
    "folded field": (START + b"a: b\r\n c\x00\r\n\r\n", (400, "invalid_http")),
    "a nul": (b"GET /live\0 HTTP/1.1\r\nHost: x\r\n\r\n", (400, "invalid_http")),
    "no http": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", (400, "invalid_http")),
}


@pytest.mark.parametrize("case", BAD_HEADS)
def test_bad_heads_are_refused_in_the_envelope(server, case, caplog):
    raw, want = BAD_HEADS[case]
    got = answer(server[0], raw)
    if got:  # a reset may overtake the answer while the client still sends
        assert refusal(got) == want
    else:
        assert case == "a million fields"
    assert not [r for r in caplog.records if r.levelname == "ERROR"], "a client's fault is not the server's"
    assert b" 200 " in answer(server[0], START + b"\r\n")


@pytest.fixture(scope="module")
def apart():
    """Yields (port, process) of a server that has its own process and so its own memory."""
    with process() as (server, url):
        yield int(url.rpartition(":")[2]), server.pid


def test_a_head_without_end_is_cut_after_its_limit(apart):
    """Of a header field of 100 MB the server takes little, and it keeps nothing."""
    port, pid = apart
    before, sent = resident(pid), 0
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        connection.sendall(START + b"x: ")
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while sent < 100_000_000:
                sent += connection.send(b"a" * 16384)
    assert sent < 16_000_000, "what the sockets' buffers hold may be lost on the way, no more"
    assert resident(pid) - before < 30_000_000


def test_a_body_without_end_costs_no_memory(apart):
    """A body of 200 MB in chunks is refused with 413 at the limit, and the rest is read and dropped."""
    port, pid = apart
    before, highest = resident(pid), 0
    chunk = b"%x\r\n%s\r\n" % (1 << 20, b" " * (1 << 20))
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(head(PATH, None, CHUNKED))
            for _ in range(200):
                connection.sendall(chunk)
                highest = max(highest, resident(pid) - before)
        assert parsed(connection.recv(65536))[0] == 413
    assert highest < 60_000_000, "the limit is 8 MB, a body is copied a few times"


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"GET /live HTTP/1.1\r\n", id="half a head"),
        pytest.param(head(PATH, 10) + b"{", id="half a body"),
        pytest.param(head(PATH, None, CHUNKED) + b"5\r\n{", id="half a chunk"),
    ],
)
def test_who_stops_sending_is_let_go(hasty, sent):
    start = time.monotonic()
    got = answer(hasty, sent)
    assert time.monotonic() - start > 0.4
    assert not got or parsed(got)[0] == 408


def test_a_head_that_trickles_in_is_cut_too(hasty):
    """A slow head is cut long before its end, which would come after 50 seconds at the earliest."""
    with (
        socket.create_connection(("127.0.0.1", hasty)) as connection,
        pytest.raises((ConnectionResetError, BrokenPipeError)),
    ):
        for byte in START * 100:
            connection.sendall(bytes([byte]))
            time.sleep(0.01)


TOO_MUCH = [
    ({"n": 129}, "n"),
    ({"prompt": ["a"] * 1025}, "prompt"),
    ({"prompt": ["a"] * 100, "n": 100}, "n"),
    ({"stop": "s" * 1025}, "stop"),
    ({"stop": ["s"] * 17}, "stop"),
    ({"stop_token_ids": [1] * 129}, "stop_token_ids"),
    ({"max_tokens": 2**31}, "max_tokens"),
    ({"prompt": "a" * 5000}, "prompt"),
]


@pytest.mark.parametrize(("change", "param"), TOO_MUCH)
def test_what_is_asked_for_is_bounded_before_it_is_made(server, change, param):
    port, engine, _ = server
    before = len(engine.seen)
    status, body = asyncio.run(ask(port, post(PATH, {**SMALL, **change})))
    error = json.loads(body)["error"]
    assert (status, error["param"]) == (400, param) and re.search(r"\d", error["message"])
    assert len(engine.seen) == before


def test_pipelined_requests_are_answered_in_order(server):
    one = post(PATH, SMALL).replace(b"Connection: close\r\n", b"")
    raw = answer(server[0], one + one.replace(b'"ab"', b'"xy"') + post("/nowhere", {}))
    assert re.findall(rb"HTTP/1.1 (\d+)|\"text\":\"(\w*)\"", raw) == [
        (b"200", b""), (b"", b"a"), (b"200", b""), (b"", b"x"), (b"404", b"")
    ]  # fmt: skip


# ---- clients that do not read ----------------------------------------------------------------------


@contextlib.contextmanager
def narrow(pace: float = 0.0, write_timeout: float = 0.5):
    """Yields a server whose sockets hold little, so that a client that does not read counts at once."""
    engine = FakeEngine(ByteCodec(), max_model_len=4096, pace=pace)
    with listening(engine, write_timeout=write_timeout) as (url, server):
        eventually(lambda: server.started)
        for listener in server.servers[0].sockets:
            with socket.socket(fileno=os.dup(listener.fileno())) as same:  # accepted sockets inherit it
                same.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        yield int(url.rpartition(":")[2]), engine, server


LONG = {"prompt": "abc", "max_tokens": 4000, "stream": True}


def test_who_does_not_read_is_let_go_and_the_engine_freed():
    ends = []

    class Listener:
        def token(self, request, now): ...
        def finished(self, request, reason):
            ends.append(reason)

    async def stare(port: int) -> None:
        async with connected(port, buffer=4096) as (_, writer):
            writer.transport.pause_reading()
            writer.write(post(PATH, LONG))
            while not ends:
                await asyncio.sleep(0.05)

    with narrow(pace=0.01) as (port, engine, server):  # tokens for 40 s
        engine.add_listener(Listener())
        asyncio.run(asyncio.wait_for(stare(port), 120))
        assert ends == ["abort"]
        assert eventually(lambda: not server.service.generations and not server.server_state.connections)


def test_who_reads_slowly_gets_all_of_it():
    """A client that reads a byte at a time, for longer than the write timeout, gets everything.

    Only progress counts.
    """
    with narrow(write_timeout=2) as (port, engine, server):

        async def sip() -> tuple[int, bytes]:
            async with connected(port, buffer=4096) as (reader, writer):
                writer.write(post(PATH, {**LONG, "max_tokens": 100}))
                raw = bytearray()
                while part := await reader.read(1):
                    raw += part
                    if len(raw) % 200 == 0:
                        await asyncio.sleep(0.04)
                return parsed(bytes(raw))

        start = time.monotonic()
        status, body = asyncio.run(sip())
        assert status == 200 and time.monotonic() - start > 2.5
        text = "".join(e["choices"][0]["text"] for e in events(body))
        assert text == "abc" * 25 and len(events(body)) == 100
        assert not engine.running and not server.service.generations


def test_the_answer_to_nobody_does_not_stay_in_memory():
    """An answer that is larger than the sockets hold does not stay in memory if the client takes nothing."""

    async def stare(port: int) -> None:
        async with connected(port, buffer=4096) as (_, writer):
            writer.transport.pause_reading()
            writer.write(post(PATH, {"prompt": "abc", "max_tokens": 1000, "n": 8, "logprobs": 5}))
            while not engine.seen or server.server_state.connections:
                await asyncio.sleep(0.05)

    with narrow() as (port, engine, server):
        asyncio.run(asyncio.wait_for(stare(port), 60))
        assert not engine.running and not server.service.generations


# ---- the queue, the clock, the key -----------------------------------------------------------------


def test_exactly_as_many_as_there_is_room_for():
    """The server takes exactly as many requests as it has places. No place gets free before all have come."""
    engine = FakeEngine(ByteCodec(), max_model_len=4096, pace=0.005, room=6, holds_at=0)

    async def all_at_once(port: int) -> list[tuple[int, bytes]]:
        body = post(PATH, {"prompt": "abc", "max_tokens": 20, "n": 2})
        asked = [asyncio.create_task(ask(port, body)) for _ in range(10)]
        while sum(task.done() for task in asked) < 7:
            await asyncio.sleep(0.01)
        engine.going.set()
        return await asyncio.gather(*asked)

    with listening(engine) as (url, _):
        results = asyncio.run(asyncio.wait_for(all_at_once(int(url.rpartition(":")[2])), 120))
        statuses = sorted(status for status, _ in results)
        assert statuses == [200] * 3 + [503] * 7, "each counts as two, all or nothing"
        assert len(engine.seen) == 6
        refused = httpx.post(f"{url}{PATH}", json={**SMALL, "n": 7}, timeout=60)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["error"]["code"] == "queue_full"


def test_a_request_that_takes_too_long_ends_with_504_or_an_event():
    engine = FakeEngine(ByteCodec(), max_model_len=4096, pace=0.001, holds_at=9)
    with listening(engine, request_timeout=1) as (url, server):
        start = time.monotonic()
        whole = httpx.post(f"{url}{PATH}", json={"prompt": "abc", "max_tokens": 2000, "n": 2}, timeout=60)
        assert time.monotonic() - start >= 1
        error = whole.json()["error"]
        assert (whole.status_code, error["code"], error["type"]) == (504, "timeout", "server_error")
        assert "1 seconds" in error["message"] and not engine.running
        body = {"prompt": "abc", "max_tokens": 2000, "stream": True}
        stream = httpx.post(f"{url}{PATH}", json=body, timeout=60)
        sent = events(stream.content)
        assert stream.status_code == 200 and len(sent) == 10 and sent[-1]["error"]["code"] == "timeout"
        assert eventually(lambda: not engine.running and not server.service.generations)
        assert httpx.post(f"{url}{PATH}", json=SMALL, timeout=60).status_code == 200


def test_an_engine_that_does_not_take_requests_is_waited_for_no_longer():
    engine = FakeEngine(ByteCodec(), pace=0.001, holds_at=0)
    taken, answered = engine.submit, threading.Event()

    def slowly(requests):
        answered.wait(60)
        taken(requests)

    engine.submit = slowly
    with listening(engine, request_timeout=0.2) as (url, server):
        assert httpx.post(f"{url}{PATH}", json=SMALL, timeout=30).status_code == 504
        answered.set()
        assert eventually(lambda: engine.seen and not engine.running), "what it took late is aborted"
        assert not server.service.generations


def test_the_key_is_compared_whole_and_in_constant_time(monkeypatch):
    compared = []

    def compare(a, b):
        compared.append((a, b))
        return a == b

    monkeypatch.setattr(middleware.secrets, "compare_digest", compare)
    with listening(FakeEngine(ByteCodec()), api_key="secret") as (url, _):
        for key in ("secret", "secre", "secret2", "-", "s" * 10_000, "SECRET"):
            status = httpx.get(
                f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}, timeout=60
            ).status_code
            assert status == (200 if key == "secret" else 401), key
    assert len(compared) == 1 + 2 * 5, "both keys are compared, also one that is not there"
    assert {len(side) for pair in compared for side in pair} == {32}, "digests: no length, no prefix shows"


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_a_request_timeout_is_a_time(value):
    with pytest.raises(ValueError, match="request_timeout must be above 0 seconds"):
        ServerSettings(request_timeout=value)
