"""From bytes on the wire to a struct of ``schema``; every failure is a 4xx that names its cause."""

import asyncio
import contextlib
import re
import zlib
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from jmoe.server.errors import ApiError, invalid, unavailable
from jmoe.server.request.bounds import LIGHT, check_json
from jmoe.server.request.nulls import without_unknown_nulls
from jmoe.server.settings import ServerSettings

Body = TypeVar("Body", bound=msgspec.Struct)
_PLACE = re.compile(r"(?P<what>.*) - at `\$\.?(?P<path>.*)`", re.DOTALL)
_FIELD = re.compile(r"Object (?:contains unknown|missing required) field `(.*)`", re.DOTALL)
_SURROGATES = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}(\\u[dD][c-fC-F][0-9a-fA-F]{2})?")
MIN_RATE = 16 * 1024  # bytes per second at which a body must arrive after ``body_timeout`` is over


class BodyBytes:
    """Counts the bytes of all bodies being read or worked on. Beyond ``limit`` only small bodies may grow."""

    def __init__(self, limit: int):
        self.limit, self.taken = limit, 0

    @contextlib.contextmanager
    def held(self) -> Iterator["HeldBytes"]:
        held = HeldBytes(self)
        try:
            yield held
        finally:
            self.taken -= held.count


class HeldBytes:
    """The counted bytes of one body."""

    def __init__(self, of: BodyBytes):
        self.of, self.count = of, 0

    def add(self, count: int) -> None:
        """Counts more bytes of this body; 503 if there is no room. A small body always has room."""
        if self.count + count > LIGHT and self.of.taken + count > self.of.limit:
            error = unavailable(f"request bodies of {self.of.limit} bytes are being worked on", "bodies_full")
            error.headers["Connection"] = "close"
            raise error
        self.count += count
        self.of.taken += count


async def read_body(request: Request, settings: ServerSettings, held: HeldBytes) -> bytes:
    """Reads the whole body of a JSON request.

    415 for another content type or encoding, 413 beyond the size limit, 408 if it arrives too slowly: nothing
    for ``body_timeout`` seconds, or after these a mean rate below ``MIN_RATE``.
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
        held.add(len(part))
        parts.append(part)
        more = message.get("more_body", False)
    whole = b"".join(parts)
    if coding == "identity":
        return whole
    whole = await asyncio.to_thread(inflated, whole, limit)
    if len(whole) > limit:
        raise too_long
    held.add(len(whole))
    return whole


def inflated(raw: bytes, limit: int) -> bytes:
    """Returns the content of a gzip body, or its first ``limit`` + 1 bytes; 400 if it is not gzip.

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


def decode(raw: bytes, kind: type[Body]) -> Body:
    """Decodes the body as ``kind``. A 400 has the code invalid_json if it is no JSON object, else it names
    the field."""
    check_json(raw)
    try:
        body = _decoded(raw, kind)
        _keep_sent(body, raw)
        return body
    except msgspec.ValidationError as error:
        raise _bad_field(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        cause = "nested too deeply" if isinstance(error, RecursionError) else "not valid UTF-8"
        if isinstance(error, msgspec.DecodeError):
            cause = _lone_surrogate(raw) or str(error)
        raise invalid(f"the request body cannot be read as JSON: {cause}", code="invalid_json") from None


def _decoded(raw: bytes, kind: type[Body]) -> Body:
    """A null field that ``kind`` does not have counts as absent; only a body with an unknown field is decoded
    twice."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        if not str(error).startswith("Object contains unknown field"):
            raise
    return msgspec.convert(without_unknown_nulls(msgspec.json.decode(raw), kind), kind)


class _Conversation(msgspec.Struct):
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None


def _keep_sent(body: msgspec.Struct, raw: bytes) -> None:
    """Stores in each message and tool of ``body``, as ``sent``, the JSON object that it was decoded from."""
    kept = [name for name in _Conversation.__struct_fields__ if getattr(body, name, None)]
    if kept:
        sent = msgspec.json.decode(raw, type=_Conversation)
        for name in kept:
            for each, given in zip(getattr(body, name), getattr(sent, name), strict=True):
                each.__dict__["sent"] = given


def _lone_surrogate(raw: bytes) -> str | None:
    """Names half a surrogate pair as the cause: at a string's end the decoder reports truncated input."""
    alone = any(found[1] is None for found in _SURROGATES.finditer(raw))
    return "a \\u escape is half of a surrogate pair" if alone else None


def _bad_field(text: str) -> ApiError:
    if len(text) > 4096:  # a name may have megabytes; the path is at the end
        text = text[:2048] + text[-2048:]
    place = _PLACE.fullmatch(text)
    what, path = (place["what"], place["path"]) if place else (text, "")
    field = _FIELD.fullmatch(what)
    if field is not None:
        path = f"{path}.{field[1]}" if path else field[1]
        path = path[:200]
        if "unknown" in what[:25]:
            return invalid(f"Unrecognized request argument: {path}", path, "unknown_parameter")
        return invalid(f"{path} is required", path, "missing_required_parameter")
    if not path:
        return invalid(f"the request body must be a JSON object: {what}", code="invalid_json")
    return invalid(f"{path[:200]}: {what[:300]}", path[:200])
