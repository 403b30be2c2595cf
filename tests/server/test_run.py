"""Tests a real server on a real socket: clients that leave, signals, limits of the wire."""

import contextlib
import signal
import socket

import httpx
import openai
import pytest
from support.ports import own_port
from support.server.fake_engine import TEMPLATE, ByteCodec, FakeEngine, eventually, listening
from support.server.processes import let_go, process
from support.server.raw_http import post

from jmoe.server.run import bind

SLOW = 0.02  # seconds per token
LONG = {"prompt": "abc", "max_tokens": 2000, "temperature": 0}


def slow_engine(pace=SLOW) -> FakeEngine:
    return FakeEngine(ByteCodec(), max_model_len=4096, pace=pace)


def test_openai_client_streams_what_it_also_gets_whole():
    with listening(slow_engine(0.001), api_key="k") as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0)
        assert client.models.retrieve("fake").id == "fake"
        whole = client.completions.create(model="fake", prompt="abc", max_tokens=6, n=2, logprobs=1)
        options = {"include_usage": True}
        stream = client.completions.create(
            model="fake", prompt="abc", max_tokens=6, n=2, stream=True, stream_options=options
        )
        chunks = list(stream)
        for choice in whole.choices:
            parts = [c.text for chunk in chunks for c in chunk.choices if c.index == choice.index]
            assert "".join(parts) == choice.text == "abca" and len(parts) == 6
        assert chunks[-1].usage == whole.usage
        with pytest.raises(openai.BadRequestError) as error:
            client.completions.create(model="fake", prompt="abc", n=2, best_of=3)
        assert error.value.param == "best_of" and error.value.code == "unsupported_parameter"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("other")
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0).models.list()


def test_client_that_leaves_frees_its_requests():
    engine = slow_engine()
    with listening(engine) as (url, server):
        with httpx.stream(
            "POST", f"{url}/v1/completions", json={**LONG, "stream": True, "n": 3}, timeout=60
        ) as response:
            lines = response.iter_lines()
            next(lines)
            assert len(engine.running) == 3
        assert eventually(lambda: not engine.running)
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
            connection.sendall(post("/v1/completions", LONG))
            assert eventually(lambda: engine.running)
        assert eventually(lambda: not engine.running and not server.service.generations)
        aborted = 'jmoe_request_success_total{finished_reason="abort"} 4.0'
        assert eventually(lambda: aborted in httpx.get(f"{url}/metrics", timeout=60).text)


CHAT = {"messages": [{"role": "user", "content": "hi"}], "stream": True}


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/chat/completions", CHAT | {"max_tokens": 2000}),
        ("/v1/messages", CHAT | {"max_tokens": 2000}),
        ("/v1/responses", {"input": "hi", "max_output_tokens": 2000, "stream": True}),
    ],
)
def test_a_client_that_leaves_a_conversation_frees_its_request(route, body, tmp_path):
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    engine = slow_engine()
    with listening(engine, tmp_path) as (url, server):
        with httpx.stream("POST", f"{url}{route}", json=body, timeout=60) as response:
            assert any("delta" in line for line in response.iter_lines()) and engine.running
        assert eventually(lambda: not engine.running and not server.service.generations)
        whole = body | {"stream": False}
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
            connection.sendall(post(route, whole))
            assert eventually(lambda: engine.running)
        assert eventually(lambda: not engine.running and not server.service.generations)


def test_dead_engine_ends_streams_and_the_server():
    engine = slow_engine()
    with listening(engine) as (url, server):
        with httpx.stream(
            "POST", f"{url}/v1/completions", json={**LONG, "stream": True}, timeout=60
        ) as response:
            lines = response.iter_lines()
            next(lines)
            engine.die()
            rest = [line for line in lines if line]
        assert "engine_dead" in rest[-2] and rest[-1] == "data: [DONE]"
        assert eventually(lambda: server.should_exit) and server.exit_code == 1


def raw(url: str, data: bytes, parts: int = 1) -> bytes:
    """Returns what the server answers to bytes, until it closes."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        with contextlib.suppress(OSError):  # the server may close before all is sent
            for _ in range(parts):
                connection.sendall(data)
        with contextlib.suppress(ConnectionResetError):
            return connection.recv(4096)
    return b""


def test_limits_of_the_wire():
    with listening(slow_engine(), header_timeout=0.3) as (url, _):
        assert raw(url, b"GET /live HTTP/1.1\r\nx: ") == b""  # a head that never ends is cut
    with listening(slow_engine(), body_timeout=0.3, max_body_bytes=1000) as (url, _):
        assert b" 431 " in raw(url, b"GET /live HTTP/1.1\r\nx: " + b"a" * 70_000)
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        assert b" 413 " in raw(url, head + b"Content-Length: 90000000000\r\n\r\n")
        assert b" 408 " in raw(url, head + b"Content-Length: 5\r\n\r\n{")
        both = head + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        assert b" 400 " in raw(url, both)
        assert httpx.get(f"{url}/live", timeout=60).status_code == 200


def test_taken_port_is_one_line():
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError) as error:
            bind("127.0.0.1", port)
        assert str(error.value) == f"port {port} on 127.0.0.1 is in use"
    with pytest.raises(ValueError, match="cannot listen on 192"):
        bind("192.0.2.1", 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_streams_finish_and_refuses_new_work(number):
    with process(holds_at=1) as (server, url):
        body = {"prompt": "abc", "max_tokens": 50, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.send_signal(number)
            assert eventually(lambda: httpx.get(f"{url}/ready", timeout=60).status_code == 503)
            refused = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert refused.headers["connection"] == "close"
            assert httpx.get(f"{url}/live", timeout=60).status_code == 200
            let_go(server)
            rest = [line for line in lines if line]
        assert '"finish_reason":"length"' in rest[-2] and rest[-1] == "data: [DONE]" and len(rest) == 50
        assert server.wait(60) == 0


@pytest.mark.parametrize(("timeout", "signals"), [(0.3, 1), (600, 2)])
def test_what_does_not_finish_is_ended(tmp_path, timeout, signals):
    """Unfinished answers end with an error after the shutdown timeout, or at once at the second signal.

    Neither is a fault, so neither leaves a traceback.
    """
    log = tmp_path / "log"
    with log.open("wb") as file, process(timeout, log=file, holds_at=1) as (server, url):
        with httpx.stream(
            "POST", f"{url}/v1/completions", json={**LONG, "stream": True}, timeout=60
        ) as response:
            lines = response.iter_lines()
            next(lines)
            server.send_signal(signal.SIGINT)
            if signals == 2:  # later, because two pending signals count as one
                assert eventually(lambda: httpx.get(f"{url}/ready", timeout=60).status_code == 503)
                server.send_signal(signal.SIGINT)
            with contextlib.suppress(httpx.RemoteProtocolError):
                rest = [line for line in lines if line]
                assert "shutting down" in rest[-2] and rest[-1] == "data: [DONE]"
        assert server.wait(60) == 0
    assert "Traceback" not in log.read_text()


def test_kill_9_in_mid_stream_frees_the_port():
    """After kill -9 the client sees that its answer is not whole, and the next server gets the port."""
    port = own_port()
    for _ in range(2):
        with process(port=port) as (server, url):
            with httpx.stream(
                "POST", f"{url}/v1/completions", json={**LONG, "stream": True}, timeout=60
            ) as response:
                lines = response.iter_lines()
                next(lines)
                server.kill()
                with pytest.raises(httpx.TransportError):
                    list(lines)
            assert server.wait(60) == -signal.SIGKILL
