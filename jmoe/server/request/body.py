"""Reads the bytes of a request's body, within bounds of size, memory and time."""

import asyncio
import contextlib
import zlib
from collections.abc import Iterator

from starlette.requests import ClientDisconnect, Request

from jmoe.server.errors import ApiError, invalid, unavailable
from jmoe.server.request.bounds import LIGHT
from jmoe.server.settings import ServerSettings

MIN_RATE = 16 * 1024  # bytes per second at which a body must arrive after ``body_timeout`` is over


class BodyBytes:
    """Counts the bytes of all bodies that are being read or worked on. Beyond ``limit`` only small bodies may
    grow."""

    def __init__(self, limit: int):
        self.limit, self.num_bytes = limit, 0

    @contextlib.contextmanager
    def one_body(self) -> Iterator["OneBody"]:
        body = OneBody(self)
        try:
            yield body
        finally:
            self.num_bytes -= body.num_bytes


class OneBody:
    """Counts the bytes of one body."""

    def __init__(self, total: BodyBytes):
        self.total, self.num_bytes = total, 0

    def add(self, count: int) -> None:
        """Counts more bytes of this body; raises a 503 if there is no room. A small body always has room."""
        if self.num_bytes + count > LIGHT and self.total.num_bytes + count > self.total.limit:
            message = f"request bodies of {self.total.limit} bytes are being worked on"
            error = unavailable(message, "bodies_full")
            error.headers["Connection"] = "close"
            raise error
        self.num_bytes += count
        self.total.num_bytes += count


async def read_body(request: Request, settings: ServerSettings, counter: OneBody) -> bytes:
    """Reads the whole body of a JSON request.

    It raises a 415 for another content type or encoding, a 413 beyond the size limit, and a 408 if the body
    arrives too slowly: nothing for ``body_timeout`` seconds, or after these a mean rate below ``MIN_RATE``.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f"Content-Type must be application/json, got {kind[:100]!r}"
        raise ApiError(415, message, code="unsupported_media_type")
    coding = ",".join(request.headers.getlist("content-encoding")).strip().lower() or "identity"
    if coding not in ("identity", "gzip", "x-gzip"):
        message = f"Content-Encoding must be gzip or absent, got {coding[:100]!r}"
        raise ApiError(415, message, code="unsupported_encoding", headers={"Accept-Encoding": "gzip"})
    limit = settings.max_body_bytes
    too_long = ApiError(413, f"the request body exceeds the limit of {limit} bytes", code="body_too_large")
    stalled = ApiError(408, "the request body did not arrive in time", headers={"Connection": "close"})
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise too_long
    loop = asyncio.get_running_loop()
    parts, size, more, latest = [], 0, True, loop.time() + settings.body_timeout
    while more:
        try:
            async with asyncio.timeout_at(min(loop.time() + settings.body_timeout, latest + size / MIN_RATE)):
                message = await request.receive()
        except TimeoutError:
            raise stalled from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        part = message.get("body", b"")
        size += len(part)  # counted here too: a chunked body declares no length
        if size > limit:
            raise too_long
        counter.add(len(part))
        parts.append(part)
        more = message.get("more_body", False)
    whole = b"".join(parts)
    if coding == "identity":
        return whole
    whole = await asyncio.to_thread(inflated, whole, limit)
    if len(whole) > limit:
        raise too_long
    counter.add(len(whole))
    return whole


def inflated(raw: bytes, limit: int) -> bytes:
    """Returns the content of a gzip body, or its first ``limit`` + 1 bytes; raises a 400 if it is not gzip.

    The number of gzip members is limited: each costs time, and may hold nothing.
    """
    held = bytearray()
    for _ in range(64):
        stream = zlib.decompressobj(wbits=31)
        try:
            held += stream.decompress(raw, limit + 1 - len(held))
        except zlib.error as error:
            raise _no_gzip(str(error)) from None
        raw = stream.unused_data
        if len(held) > limit or (stream.eof and not raw):
            return bytes(held)
        if not stream.eof:
            raise _no_gzip("it is cut off")
    raise _no_gzip("it has more than 64 members")


def _no_gzip(cause: str) -> ApiError:
    return invalid(f"the request body cannot be read as gzip: {cause}", code="invalid_encoding")
