"""Long JSON answers, encoded and sent in pieces so that they hold up no other work."""

import asyncio
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

PIECE_ITEMS = 64  # list items encoded in one call, during which no other thread runs
PIECE_BYTES = 64 * 1024  # bytes of an answer written at a time


def encoded(value: Any, depth: int = 4) -> Iterator[bytes]:
    """Encodes JSON in pieces that are each made quickly: structs, objects and lists are split down to
    ``depth``, and long lists into ``PIECE_ITEMS`` items at a time."""
    if isinstance(value, dict | msgspec.Struct) and depth:
        items = value.items() if isinstance(value, dict) else _fields(value)
        opening = b"{"
        for key, item in items:
            yield opening + msgspec.json.encode(key) + b":"
            yield from encoded(item, depth - 1)
            opening = b","
        yield b"{}" if opening == b"{" else b"}"
    elif isinstance(value, list) and value and depth and isinstance(value[0], dict | msgspec.Struct):
        for i, item in enumerate(value):
            yield b"," if i else b"["
            yield from encoded(item, depth - 1)
        yield b"]"
    elif isinstance(value, list) and len(value) > PIECE_ITEMS:
        for start in range(0, len(value), PIECE_ITEMS):
            yield (b"," if start else b"[") + msgspec.json.encode(value[start : start + PIECE_ITEMS])[1:-1]
        yield b"]"
    else:
        yield msgspec.json.encode(value)


def _fields(struct: msgspec.Struct) -> Iterator[tuple[str, Any]]:
    """Returns the struct's keys and values in JSON, without those that are UNSET."""
    for name, key in zip(struct.__struct_fields__, struct.__struct_encode_fields__, strict=True):
        if (value := getattr(struct, name)) is not msgspec.UNSET:
            yield key, value


def joined(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yields the same bytes, ``PIECE_BYTES`` or a little more at a time."""
    part = bytearray()
    for piece in pieces:
        part += piece
        if len(part) >= PIECE_BYTES:
            yield bytes(part)
            part.clear()
    if part:
        yield bytes(part)


class PiecesResponse(Response):
    """A JSON response of several pieces that are not copied into one."""

    def __init__(self, pieces: list[bytes]):
        super().__init__(media_type="application/json")
        self.headers["content-length"] = str(sum(map(len, pieces)))
        self.pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for piece in self.pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(0)  # a client that reads everything at once must not occupy the event loop
        await send({"type": "http.response.body", "body": b"", "more_body": False})
