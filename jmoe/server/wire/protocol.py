"""The HTTP protocol of a connection: uvicorn's h11 protocol with limits on time and on heads, which it lacks,
and with the rules of RFC 9112 for request targets, empty lines and persistent connections.
"""

import asyncio
import re
import sys
from collections.abc import Collection
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

import h11
import msgspec
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from jmoe.server.errors import ApiError
from jmoe.server.settings import ServerSettings
from jmoe.server.wire.connection_limit import SPARE_TIMEOUT, ConnectionLimit

MAX_HEADERS = 100
ALLOW = "GET, HEAD, POST, DELETE, OPTIONS"  # all methods that the server answers
_EMPTY_LINES = re.compile(rb"(?:\r?\n)+")
_ABSOLUTE_TARGET = re.compile(rb"https?://(?P<host>[^/?#]+)", re.IGNORECASE)
READ_BYTES = 8 * 1024  # bytes read from a connection at a time, so that it delays the others only shortly
FREE_CHUNKS = 1000  # chunks of a body that may have any size
MIN_CHUNK = 16  # least mean bytes per chunk if a body has more chunks


class TinyChunks(h11.RemoteProtocolError):
    """Raised when a body has too many tiny chunks: each costs the event loop as much as a whole request's
    head."""


class Connection(h11.Connection):
    """An h11 connection that refuses a body of very many very small chunks, and ignores empty lines before a
    request, as RFC 9112 (2.2) requires: some clients end a body with one."""

    chunks = chunk_bytes = 0

    def next_event(self) -> Any:  # an event of h11, or one of its two markers
        received = self._receive_buffer
        if self.their_state is h11.IDLE and (empty := _EMPTY_LINES.match(received._data)) is not None:
            received.maybe_extract_at_most(empty.end())
        if self.their_state is h11.IDLE and received._data == b"\r":
            return h11.NEED_DATA
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.chunks = self.chunk_bytes = 0
        elif isinstance(event, h11.Data) and (event.chunk_start or event.chunk_end):
            self.chunks += event.chunk_end
            self.chunk_bytes += len(event.data)
            if self.chunks > FREE_CHUNKS and self.chunk_bytes < self.chunks * MIN_CHUNK:
                raise TinyChunks(f"{self.chunks} chunks of the body have less than {MIN_CHUNK} bytes each")
        return event


def protocol(
    settings: ServerSettings, connection_limit: ConnectionLimit, probe_paths: Collection[str]
) -> type[H11Protocol]:
    """Returns a protocol class, of which uvicorn makes one instance for each connection.

    probe_paths: paths of the health probes, which are answered beyond the limit too.
    """

    class Guarded(H11Protocol):
        head_timer: asyncio.TimerHandle | None = None
        rest_timer: asyncio.TimerHandle | None = None
        write_timer: asyncio.TimerHandle | None = None
        unsent_bytes = 0
        head_timeout = settings.header_timeout

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.conn = Connection(h11.SERVER, settings.max_header_bytes)
            transport.max_size = READ_BYTES  # type: ignore[attr-defined]
            transport.set_write_buffer_limits(high=0)  # so writing pauses as soon as the client stops reading
            entry = connection_limit.enter(self, len(self.connections))
            if entry == "refused":
                transport.abort()
            elif entry == "probes":
                self.app = connection_limit.only_probes(self.app, probe_paths)
                self.head_timeout = SPARE_TIMEOUT
            self._watch_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch_head()
            self._watch_rest()

        def on_response_complete(self) -> None:
            """Restarts the timers: part of the next request's head may have come with the last request."""
            super().on_response_complete()
            self._watch_rest()
            if self.conn.trailing_data[0]:
                self._watch_head()
            elif self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                connection_limit.idle[self] = None

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_head_timer()
            self._stop_rest_timer()
            self._stop_write_timer()
            super().connection_lost(exc)

        def _watch_head(self) -> None:
            """Limits the time to a complete head: until then h11 says that the client's side is idle."""
            if self.conn.their_state is not h11.IDLE:
                self._stop_head_timer()
            elif self.head_timer is None:
                connection_limit.idle[self] = None
                self.head_timer = self.loop.call_later(self.head_timeout, self.transport.close)

        def _watch_rest(self) -> None:
            """Limits the time for the rest of a body that was answered before its end, as for a head."""
            answered = self.conn.our_state in (h11.DONE, h11.MUST_CLOSE, h11.CLOSED)
            if not (answered and self.conn.their_state is h11.SEND_BODY):
                self._stop_rest_timer()
            elif self.rest_timer is None:
                self.rest_timer = self.loop.call_later(self.head_timeout, self.transport.abort)

        def _stop_rest_timer(self) -> None:
            if self.rest_timer is not None:
                self.rest_timer.cancel()
                self.rest_timer = None

        def _stop_head_timer(self) -> None:
            connection_limit.idle.pop(self, None)
            if self.head_timer is not None:
                self.head_timer.cancel()
                self.head_timer = None

        def pause_writing(self) -> None:
            super().pause_writing()
            self._watch_writing()

        def resume_writing(self) -> None:
            self._stop_write_timer()
            super().resume_writing()

        def _watch_writing(self) -> None:
            self.unsent_bytes = self.transport.get_write_buffer_size()
            self.write_timer = self.loop.call_later(settings.write_timeout, self._check_writing)

        def _check_writing(self) -> None:
            """Aborts rather than closes: a close waits for the client to read."""
            if self.transport.get_write_buffer_size() < self.unsent_bytes:
                self._watch_writing()
            else:
                self.transport.abort()

        def _stop_write_timer(self) -> None:
            if self.write_timer is not None:
                self.write_timer.cancel()
                self.write_timer = None

        def send_400_response(self, msg: str) -> None:
            """Sends an error in the usual envelope. It is called while h11's error is handled, which says if
            the head is too large."""
            if self.cycle is not None and not self.cycle.response_complete:
                self.cycle.disconnected = True  # its handler must not answer too
                self.cycle.message_event.set()
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                error = sys.exc_info()[1]
                msg = str(error) if isinstance(error, TinyChunks) else msg
                status = 431 if getattr(error, "error_status_hint", 0) == 431 else 400
                body = msgspec.json.encode(ApiError(status, msg, code="invalid_http").envelope())
                head = [("content-type", "application/json"), ("content-length", str(len(body)))]
                head += [("connection", "close")]
                answer = h11.Response(status_code=status, headers=head, reason=HTTPStatus(status).phrase)
                for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
                    self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

    return Guarded


def wire_app(app: ASGIApp, settings: ServerSettings) -> ASGIApp:
    """Wraps ``app`` in the layers that concern the connection rather than the request."""
    return KeepAlive(HeadLimits(Targets(app), settings.max_header_bytes), settings.keep_alive)


class HeadLimits:
    """Refuses a head beyond the limits, and a head that two servers in a row could delimit differently.

    h11 counts the bytes of a head only while it is incomplete; a head that arrives at once is counted here.
    """

    def __init__(self, app: ASGIApp, max_bytes: int):
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._refusal(scope["headers"], scope["http_version"]) if scope["type"] == "http" else None
        await (self.app if error is None else error.response())(scope, receive, send)

    def _refusal(self, headers: list[tuple[bytes, bytes]], version: str) -> ApiError | None:
        close = {"Connection": "close"}
        names = [name for name, _ in headers]
        if len(names) > MAX_HEADERS:
            message = f"{len(names)} header fields exceed the limit of {MAX_HEADERS}"
            return ApiError(431, message, code="head_too_large", headers=close)
        if sum(len(name) + len(value) + len(": \r\n") for name, value in headers) > self.max_bytes:
            message = f"the header fields exceed the limit of {self.max_bytes} bytes"
            return ApiError(431, message, code="head_too_large", headers=close)
        if b"content-length" in names and b"transfer-encoding" in names:
            message = "Content-Length and Transfer-Encoding contradict each other; send one"
            return ApiError(400, message, code="invalid_http", headers=close)
        if b"transfer-encoding" in names and version == "1.0":  # a proxy before this server may not know it
            message = "HTTP/1.0 has no Transfer-Encoding"
            return ApiError(400, message, code="invalid_http", headers=close)
        return None


class Targets:
    """Handles the forms of a target other than ``/PATH`` (RFC 9112, 3.2): ``http://HOST/PATH``, and
    ``OPTIONS *``, which concerns no path and requests nothing."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        target = scope["raw_path"] if scope["type"] == "http" else b""
        if target == b"*" and scope["method"] == "OPTIONS":
            return await Response(status_code=204, headers={"Allow": ALLOW})(scope, receive, send)
        found = _ABSOLUTE_TARGET.match(target)
        await self.app(scope if found is None else _origin_form(scope, found), receive, send)


def _origin_form(scope: Scope, origin: re.Match[bytes]) -> Scope:
    raw = scope["raw_path"][origin.end() :] or b"/"
    headers = [(name, value) for name, value in scope["headers"] if name != b"host"]
    path = unquote(raw.decode("ascii"))
    return {**scope, "path": path, "raw_path": raw, "headers": [(b"host", origin["host"]), *headers]}


class KeepAlive:
    """Announces for how many seconds a connection stays open without a request."""

    def __init__(self, app: ASGIApp, seconds: int):
        stays = [(b"connection", b"keep-alive"), (b"keep-alive", b"timeout=%d" % seconds)]
        self.app, self.announced = app, stays if seconds else [(b"connection", b"close")]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_announced(message: Message) -> None:
            if message["type"] == "http.response.start" and not _closes(message["headers"]):
                message = {**message, "headers": [*message["headers"], *self.announced]}
            await send(message)

        kept = scope["type"] == "http" and scope["http_version"] == "1.1" and not _closes(scope["headers"])
        await self.app(scope, receive, send_announced if kept else send)


def _closes(headers: list[tuple[bytes, bytes]]) -> bool:
    return any(name.lower() == b"connection" and b"close" in value.lower() for name, value in headers)
