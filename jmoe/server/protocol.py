"""What a connection may do: uvicorn's h11 protocol with the limits on time and on heads that it lacks."""

import asyncio
import sys
from http import HTTPStatus
from typing import Any

import h11
import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from jmoe.server.crowd import Crowd
from jmoe.server.errors import ApiError
from jmoe.server.settings import ServerSettings

MAX_HEADERS = 100
READ_BYTES = 8 * 1024  # taken from a connection at a time, so that it holds up the others for little
FREE_CHUNKS = 1000  # of a body, of any size
MIN_CHUNK = 16  # bytes that chunks have in the mean, where there are more


class TinyChunks(h11.RemoteProtocolError):
    """Each chunk costs the event loop as much as a whole request's head."""


class CountedConnection(h11.Connection):
    """Refuses a body that comes in very many very small chunks."""

    chunks = chunk_bytes = 0

    def next_event(self) -> Any:  # of h11, or one of its two markers
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.chunks = self.chunk_bytes = 0
        elif isinstance(event, h11.Data) and (event.chunk_start or event.chunk_end):
            self.chunks += event.chunk_end
            self.chunk_bytes += len(event.data)
            if self.chunks > FREE_CHUNKS and self.chunk_bytes < self.chunks * MIN_CHUNK:
                raise TinyChunks(f"{self.chunks} chunks of the body have less than {MIN_CHUNK} bytes each")
        return event


def protocol(settings: ServerSettings, crowd: Crowd) -> type[H11Protocol]:
    """A protocol class: uvicorn makes one of it for each connection."""

    class Guarded(H11Protocol):
        head_timer: asyncio.TimerHandle | None = None
        rest_timer: asyncio.TimerHandle | None = None
        write_timer: asyncio.TimerHandle | None = None
        unsent = 0
        patience = settings.header_timeout

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.conn = CountedConnection(h11.SERVER, settings.max_header_bytes)
            transport.max_size = READ_BYTES  # type: ignore[attr-defined]
            transport.set_write_buffer_limits(high=0)  # so writing pauses as soon as the client does not read
            entry = crowd.enter(self, len(self.connections))
            if entry == "refused":
                transport.abort()
            elif entry == "probes":
                self.app, self.patience = crowd.only_probes(self.app), crowd.PATIENCE
            self._watch_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch_head()
            self._watch_rest()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch_rest()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_head_timer()
            self._stop_rest_timer()
            self._stop_write_timer()
            super().connection_lost(exc)

        def _watch_head(self) -> None:
            """Their side is idle until a head is complete."""
            if self.conn.their_state is not h11.IDLE:
                self._stop_head_timer()
            elif self.head_timer is None:
                crowd.idle[self] = None
                self.head_timer = self.loop.call_later(self.patience, self.transport.close)

        def _watch_rest(self) -> None:
            """The rest of a body that was answered before its end may take as long as a head."""
            answered = self.conn.our_state in (h11.DONE, h11.MUST_CLOSE, h11.CLOSED)
            if not (answered and self.conn.their_state is h11.SEND_BODY):
                self._stop_rest_timer()
            elif self.rest_timer is None:
                self.rest_timer = self.loop.call_later(self.patience, self.transport.abort)

        def _stop_rest_timer(self) -> None:
            if self.rest_timer is not None:
                self.rest_timer.cancel()
                self.rest_timer = None

        def _stop_head_timer(self) -> None:
            crowd.idle.pop(self, None)
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
            self.unsent = self.transport.get_write_buffer_size()
            self.write_timer = self.loop.call_later(settings.write_timeout, self._check_writing)

        def _check_writing(self) -> None:
            """Aborts rather than closes: a close waits for the client to read."""
            if self.transport.get_write_buffer_size() < self.unsent:
                self._watch_writing()
            else:
                self.transport.abort()

        def _stop_write_timer(self) -> None:
            if self.write_timer is not None:
                self.write_timer.cancel()
                self.write_timer = None

        def send_400_response(self, msg: str) -> None:
            """In the usual envelope. Called while h11's error is handled, which knows a head too large."""
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


class HeadLimits:
    """Refuses a head beyond the limits, and one that two servers in a row could cut differently.

    h11 counts the bytes of a head only while it is incomplete, so one that arrives at once is counted here.
    """

    def __init__(self, app: ASGIApp, max_bytes: int):
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._refusal(scope["headers"]) if scope["type"] == "http" else None
        await (self.app if error is None else error.response())(scope, receive, send)

    def _refusal(self, headers: list[tuple[bytes, bytes]]) -> ApiError | None:
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
        return None
