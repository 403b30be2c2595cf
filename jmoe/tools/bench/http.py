"""A small HTTP/1.1 client that records when each piece of an answer arrived and parses the pieces later.

A load generator shares its machine with the server that it measures, so it does as little as possible while
an answer grows: h11 finds the pieces, and no task is woken before the last one.
"""

import asyncio
import ssl
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import h11


class Failure(Exception):
    """The reason why a request has no answer, in few words, so that failures are counted by cause."""


@dataclass
class HttpAnswer:
    """An HTTP answer.

    status: HTTP status.
    send_time: ``time.perf_counter`` at which the request was sent.
    pieces: (``time.perf_counter``, bytes) of the body's pieces as they arrived.
    """

    status: int = 0
    send_time: float = 0.0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        return b"".join(part for _, part in self.pieces)


class HttpConnection(asyncio.Protocol):
    """A connection that is kept open; it carries one request at a time."""

    def __init__(self) -> None:
        self.http = h11.Connection(h11.CLIENT)
        self.transport: asyncio.Transport | None = None
        self.is_open, self.is_used = True, False
        self.answer, self.answer_future = HttpAnswer(), asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def ask(self, request: h11.Request, body: bytes) -> asyncio.Future:
        """Sends a request; the future's result is the whole ``HttpAnswer``."""
        assert self.transport is not None
        self.answer = HttpAnswer(send_time=time.perf_counter())
        self.answer_future = asyncio.get_running_loop().create_future()
        events = [request, h11.Data(data=body), h11.EndOfMessage()]
        self.transport.write(b"".join(self.http.send(event) or b"" for event in events))
        return self.answer_future

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        try:
            self.http.receive_data(data)
            self._take_events(now)
        except h11.RemoteProtocolError as error:
            self._fail(f"bad HTTP: {error}")

    def _take_events(self, now: float) -> None:
        while (event := self.http.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
            if isinstance(event, h11.Response):
                self.answer.status = event.status_code
            elif isinstance(event, h11.Data):
                self.answer.pieces.append((now, bytes(event.data)))
            elif isinstance(event, h11.EndOfMessage):
                self._finish()
                return

    def _finish(self) -> None:
        self.is_used = True
        if self.http.our_state is h11.DONE and self.http.their_state is h11.DONE:
            self.http.start_next_cycle()
        else:  # the server wants it to be closed
            self.close()
        if not self.answer_future.done():
            self.answer_future.set_result(self.answer)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        if not self.answer_future.done() and self.http.their_state is h11.SEND_BODY:
            try:  # a body without a length ends here
                self.http.receive_data(b"")
                self._take_events(time.perf_counter())
            except h11.RemoteProtocolError:
                pass
        self._fail("the connection broke off")

    def _fail(self, cause: str) -> None:
        if not self.answer_future.done():
            self.answer_future.set_exception(Failure(cause))
            self.answer_future.exception()  # nobody may be waiting for it
        self.close()

    def close(self) -> None:
        self.is_open = False
        if self.transport is not None:
            self.transport.close()


class Client:
    """Sends requests to one server; connections are made when needed and kept open.

    timeout: seconds per request.
    """

    def __init__(self, base_url: str, api_key: str | None = None, timeout: float = 600.0):
        url = urlsplit(base_url if "//" in base_url else f"http://{base_url}")
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"base-url must be like http://127.0.0.1:8000, got {base_url!r}")
        self.host, self.port = url.hostname, url.port or (443 if url.scheme == "https" else 80)
        self.tls = ssl.create_default_context() if url.scheme == "https" else None
        self.prefix = url.path.rstrip("/").removesuffix("/v1")
        self.headers = [("Host", url.netloc), ("Content-Type", "application/json")]
        if api_key:
            self.headers.append(("Authorization", f"Bearer {api_key}"))
        self.timeout = timeout
        self.idle_connections: list[HttpConnection] = []

    async def send(self, method: str, path: str, body: bytes = b"") -> HttpAnswer:
        """Sends a request and returns its answer with any status. It raises Failure if there is no answer."""
        headers = [*self.headers, ("Content-Length", str(len(body)))]
        request = h11.Request(method=method, target=self.prefix + path, headers=headers)
        try:
            async with asyncio.timeout(self.timeout):
                return await self._exchange(request, body)
        except TimeoutError:
            raise Failure(f"no answer within {self.timeout:g} s") from None
        except OSError as error:
            raise Failure(f"no connection: {error.strerror or error}") from None

    async def _exchange(self, request: h11.Request, body: bytes) -> HttpAnswer:
        connection = await self._connection()
        reused = connection.is_used
        try:
            answer = await connection.ask(request, body)
        except Failure:
            if not reused or connection.answer.status:
                raise
            connection = await self._fresh()  # the server had just closed the kept one
            answer = await connection.ask(request, body)
        finally:
            if not connection.answer_future.done() or connection.answer_future.cancelled():
                connection.close()
        if connection.is_open:
            self.idle_connections.append(connection)
        return answer

    async def _connection(self) -> HttpConnection:
        while self.idle_connections:
            kept = self.idle_connections.pop()
            if kept.is_open:
                return kept
        return await self._fresh()

    async def _fresh(self) -> HttpConnection:
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(HttpConnection, self.host, self.port, ssl=self.tls))[1]

    def close(self) -> None:
        for connection in self.idle_connections:
            connection.close()
