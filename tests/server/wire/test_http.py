"""Tests what RFC 9110 and 9112 require: targets, empty lines, codings, kept connections; and CORS by flag."""

import contextlib
import gzip
import json
import re
import socket
import time

import httpx
import pytest
from support.server.answers import check
from support.server.fake_engine import ByteCodec, FakeEngine, listening, served
from support.server.raw_http import head, parsed

from jmoe.server.errors import ApiError
from jmoe.server.request.body import inflated
from jmoe.server.settings import ServerSettings

PATH, LIMIT = "/v1/completions", 100_000
BODY = json.dumps({"prompt": "ab", "max_tokens": 2}).encode()
KEY = {"authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def port():
    with listening(FakeEngine(ByteCodec())) as (url, _):
        yield int(url.rpartition(":")[2])


@pytest.fixture(scope="module")
def brief():
    """Yields the port of a server that keeps an idle connection for a second."""
    with listening(FakeEngine(ByteCodec()), keep_alive=1) as (url, _):
        yield int(url.rpartition(":")[2])


@pytest.fixture(scope="module")
def locked():
    """Yields the port of a server with a key."""
    with listening(FakeEngine(ByteCodec()), api_key="secret") as (url, _):
        yield int(url.rpartition(":")[2])


def answers(port: int, *parts: bytes, pause: float = 0.0) -> bytes:
    """Returns everything that comes back until the server closes."""
    got = b""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # closed before all is sent
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                got += part
    return got


def one(connection: socket.socket) -> bytes:
    """Returns the answer to one GET /live. The end of the answer may come alone."""
    raw = b""
    while not raw.endswith(b'{"status":"ok"}'):
        raw += connection.recv(65536)
    return raw


def statuses(raw: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", raw)]


def get(target: str, more: str = "Connection: close\r\n", version: str = "1.1") -> bytes:
    return f"GET {target} HTTP/{version}\r\nHost: x\r\n{more}\r\n".encode()


# ---- the request line ----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [
    "http://x/live", "HTTP://X:8000/live", "https://user@[::1]:8000/live?a=b", "http://other.example/live",
    "http://x/l%69ve",
])  # fmt: skip
def test_absolute_targets_are_their_paths(port, target):
    assert statuses(answers(port, get(target))) == [200]


@pytest.mark.parametrize(
    "target", ["http://x", "http://x?a", "http:///live", "ftp://x/live", "//x/live", "x"]
)
def test_targets_that_are_no_path_of_ours(port, target):
    assert statuses(answers(port, get(target))) == [404]


def test_an_absolute_target_opens_no_other_path(locked):
    assert statuses(answers(locked, get("http://x/live"))) == [200]
    for target in (
        "http://live/v1/models",
        "http://x/v1/models?/live",
        "http://x//live",
        "http://x/live/../metrics",
    ):
        assert statuses(answers(locked, get(target))) == [401], target
    for more in ("", "Authorization: Bearer secret\r\n"):
        raw = answers(locked, get("http://x/v1/models", f"{more}Connection: close\r\n"))
        assert statuses(raw) == [200 if more else 401]


def test_the_server_as_a_whole_has_options(port):
    raw = answers(port, get("*").replace(b"GET", b"OPTIONS"))
    assert statuses(raw) == [204] and b"allow: GET, HEAD, POST, DELETE, OPTIONS" in raw
    assert statuses(answers(port, get("*"))) == [404]


@pytest.mark.parametrize("empty", [b"\r\n", b"\r\n" * 50, b"\n", b"\r\n\n\r\n"])
def test_empty_lines_before_a_request_are_ignored(port, empty):
    assert statuses(answers(port, empty + get("/live"))) == [200]
    assert statuses(answers(port, empty[:1], empty[1:] + get("/live"), pause=0.05)) == [200]


def test_a_body_may_be_followed_by_an_empty_line(port, brief):
    """An empty line after a body is ignored, as old clients send it. The next request comes after it.

    That request may arrive in one part or in several.
    """
    post = head(PATH, len(BODY)).replace(b"Connection: close\r\n", b"") + BODY
    assert statuses(answers(port, post + b"\r\n" + post + b"\r\n\r\n" + get("/live"))) == [200] * 3
    assert statuses(answers(port, post, b"\r\n", post, b"\r\n", get("/live"), pause=0.05)) == [200] * 3
    assert statuses(answers(brief, post + b"\r\n")) == [200], "no error where nothing follows"


@pytest.mark.parametrize("before", [b"\r", b"\r\r\n", b" \r\n", b"\0\r\n", b"x\r\n"])
def test_other_bytes_before_a_request_are_refused(port, before):
    assert statuses(answers(port, before + get("/live"))) == [400]


def test_empty_lines_without_a_request_are_let_go():
    with listening(FakeEngine(ByteCodec()), header_timeout=0.5) as (url, _):
        assert answers(int(url.rpartition(":")[2]), b"\r\n" * 1000) == b""


def test_http_1_0_has_no_chunks(port):
    chunked = head(PATH, None, "Transfer-Encoding: chunked\r\n").replace(b"/1.1", b"/1.0")
    raw = answers(port, chunked + b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY))
    status, body = parsed(raw)
    assert status == 400 and json.loads(body)["error"]["code"] == "invalid_http"
    assert statuses(answers(port, head(PATH, len(BODY)).replace(b"/1.1", b"/1.0") + BODY)) == [200]


# ---- paths ---------------------------------------------------------------------------------------------


def test_a_slash_more_is_the_same_route():
    with served(FakeEngine(ByteCodec()), api_key="secret", served_model_name="org/model/") as client:
        assert client.get("/live/").status_code == 200
        check(client.get("/v1/models/"), 401, None, "invalid_api_key")
        client.headers.update(KEY)
        assert client.get("/v1/models/").json()["object"] == "list"
        assert client.get("/v1/models/org/model/").json()["id"] == "org/model/"
        answer = client.post(f"{PATH}/", content=BODY, headers={"content-type": "application/json"})
        assert answer.status_code == 200 and not answer.history
        assert client.get(f"{PATH}/").headers["allow"] == "POST"
        for path in ("/live//", "//live", "/", "/nowhere/"):
            check(client.get(path), 404, None, "unknown_url")


@pytest.mark.parametrize(("path", "near"), [
    ("/completions", PATH), ("/chat/completions", "/v1/chat/completions"), ("/models/", "/v1/models"),
    (f"/v1{PATH}", PATH), ("/openai/v1/chat/completions", "/v1/chat/completions"), ("/v1/health", "/health"),
    ("/v1/embeddings", None), ("/", None), ("/v1", None), ("/docs", None),
])  # fmt: skip
def test_a_wrong_base_url_is_reported(path, near):
    with served(FakeEngine(ByteCodec())) as client:
        message = check(client.post(path, json={}), 404, None, "unknown_url")
        assert message == f"Not Found: POST {path}" + (f"; did you mean {near}?" if near else "")


# ---- codings -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client():
    with served(FakeEngine(ByteCodec()), max_body_bytes=LIMIT) as client:
        yield client


def coded(client, content, coding="gzip"):
    headers = {"content-type": "application/json", "content-encoding": coding}
    return client.post(PATH, content=content, headers=headers)


@pytest.mark.parametrize("coding", ["gzip", "GZIP", "x-gzip"])
def test_gzip_bodies_are_read(client, coding):
    assert coded(client, gzip.compress(BODY), coding).json()["choices"][0]["text"] == "a"
    parts = gzip.compress(BODY[:9]) + gzip.compress(b"") + gzip.compress(BODY[9:])
    assert coded(client, parts, coding).status_code == 200, "RFC 1952: members one after another"
    assert coded(client, BODY, "identity").status_code == 200
    assert coded(client, gzip.compress(BODY.ljust(LIMIT))).status_code == 200


@pytest.mark.parametrize("coding", ["br", "zstd", "deflate", "gzip, gzip", "identity, gzip", "x", "gzip;q=1"])
def test_other_codings_are_415(client, coding):
    response = coded(client, gzip.compress(BODY), coding)
    check(response, 415, None, "unsupported_encoding")
    assert response.headers["accept-encoding"] == "gzip"


def test_bodies_that_are_no_gzip(client):
    whole = gzip.compress(BODY)
    for raw in (b"", BODY, whole[:-1], whole[:12], whole + b"x", whole[:-8] + bytes(8), whole * 65):
        check(coded(client, raw), 400, None, "invalid_encoding")
    check(coded(client, gzip.compress(b"{")), 400, None, "invalid_json")


def test_a_body_is_bounded_by_what_it_holds(client):
    """The limit counts the decoded bytes of a body, and no more than the limit is decoded.

    Only a thousandth of such a body comes over the wire.
    """
    check(coded(client, gzip.compress(BODY.ljust(LIMIT + 1))), 413, None, "body_too_large")
    bomb = gzip.compress(bytes(5_000_000))
    check(coded(client, bomb), 413, None, "body_too_large")
    assert len(inflated(bomb, LIMIT)) == LIMIT + 1
    with pytest.raises(ApiError, match="more than 64 members"):
        inflated(gzip.compress(b"") * 4000, LIMIT)


# ---- kept connections ----------------------------------------------------------------------------------


def test_a_connection_is_kept_as_long_as_announced(port, brief):
    for server, seconds, requests in ((port, 75, 3), (brief, 1, 1)):
        kept = b"\r\nconnection: keep-alive\r\nkeep-alive: timeout=%d\r\n" % seconds
        with socket.create_connection(("127.0.0.1", server), timeout=60) as connection:
            for _ in range(requests):
                start = time.monotonic()
                connection.sendall(get("/live", ""))
                assert kept in one(connection)
            if seconds == 1:
                assert connection.recv(65536) == b"" and time.monotonic() - start >= 1


def test_a_client_that_closes_gets_no_keep_alive(port):
    for sent in (get("/live"), get("/live", "connection: Close\r\n"), get("/live", "", "1.0"), b"x\r\n\r\n"):
        raw = answers(port, sent)
        assert raw and b"keep-alive" not in raw.lower()


def test_a_head_that_stops_is_cut_also_after_a_request():
    """A head that began with the last request has its own time limit, shorter than an idle connection's."""
    with listening(FakeEngine(ByteCodec()), header_timeout=1, keep_alive=600) as (url, _):
        connection = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=60)
        with connection:
            connection.sendall(get("/live", "") + b"GET /live HTTP/1.1\r\n")
            assert one(connection) and connection.recv(65536) == b""


def test_connections_need_not_be_kept():
    with listening(FakeEngine(ByteCodec()), keep_alive=0) as (url, _):
        assert httpx.get(f"{url}/live", timeout=60).headers["connection"] == "close"


# ---- other origins -------------------------------------------------------------------------------------

ORIGIN = "https://chat.example.org"
PREFLIGHT = {
    "origin": ORIGIN,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-lang",
}


def allowed(response) -> dict[str, str]:
    start = "access-control-allow-"
    return {k.removeprefix(start): v for k, v in response.headers.items() if k.startswith(start)}


def test_without_the_flag_no_origin_is_allowed(client):
    response = client.options(PATH, headers=PREFLIGHT)
    check(response, 405, None, "method_not_allowed")
    assert not allowed(response) and not allowed(client.get("/live", headers={"origin": ORIGIN}))


@pytest.mark.parametrize("origins", [(ORIGIN,), ("http://a.b", ORIGIN), ("*",)])
def test_scripts_of_allowed_pages_may_ask(origins):
    want = "*" if origins == ("*",) else ORIGIN
    with served(FakeEngine(ByteCodec()), api_key="secret", allowed_origins=origins) as client:
        preflight = client.options(PATH, headers=PREFLIGHT)
        assert preflight.status_code == 200, "a browser sends no key with it"
        assert allowed(preflight) == {
            "origin": want,
            "methods": "GET, HEAD, POST, DELETE",
            "headers": PREFLIGHT["access-control-request-headers"],
        }
        assert "Origin" in preflight.headers["vary"]
        for headers, status in ((KEY, 200), ({}, 401)):
            response = client.get("/v1/models", headers=headers | {"origin": ORIGIN})
            assert response.status_code == status and allowed(response) == {"origin": want}
            assert want == "*" or "Origin" in response.headers["vary"]
            assert "x-request-id" in response.headers["access-control-expose-headers"]
        stream = client.post(PATH, json={"prompt": "a", "stream": True}, headers=KEY | {"origin": ORIGIN})
        assert stream.text.endswith("[DONE]\n\n") and allowed(stream) == {"origin": want}


def test_other_pages_may_not():
    with served(FakeEngine(ByteCodec()), allowed_origins=(ORIGIN,)) as client:
        for origin in (
            "https://evil.example",
            "null",
            ORIGIN + ".evil.example",
            ORIGIN + "/",
            "http://chat.example.org",
        ):
            preflight = client.options(PATH, headers=PREFLIGHT | {"origin": origin})
            check(preflight, 400, None, "disallowed_origin")
            assert not allowed(preflight) and "Origin" in preflight.headers["vary"]
            response = client.get("/live", headers={"origin": origin})
            assert (
                response.status_code == 200 and not allowed(response) and response.headers["vary"] == "Origin"
            )
        local = PREFLIGHT | {"access-control-request-private-network": "true"}
        assert allowed(client.options(PATH, headers=local))["private-network"] == "true"
        check(client.options(PATH, headers=PREFLIGHT | {"access-control-request-method": "PUT"}), 400, None,
              "disallowed_origin")  # fmt: skip


@pytest.mark.parametrize(
    "origin", ["https://x/", "x", "https://*.x", "HTTPS://X", "", "https://x y", "https://x,y"]
)
def test_an_origin_has_a_form(origin):
    with pytest.raises(ValueError, match="allowed_origins must be"):
        ServerSettings(allowed_origins=(origin,))


def test_settings_have_limits():
    ServerSettings(allowed_origins=("*", "null", "app://obsidian.md", "http://[::1]:3000"), keep_alive=0)
    for seconds in (-1, 10**9):
        with pytest.raises(ValueError, match="keep_alive must be an integer from 0 to 86400"):
            ServerSettings(keep_alive=seconds)
