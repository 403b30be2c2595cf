"""A bare HTTP/1.1 client on asyncio streams, for clients that misbehave: it only sends and receives bytes."""

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any


def head(path: str, length: int | None = None, more: str = "") -> bytes:
    size = "" if length is None else f"Content-Length: {length}\r\n"
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        f"{size}{more}\r\n"
    ).encode()


def post(path: str, body: Any) -> bytes:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return head(path, len(raw)) + raw


@asynccontextmanager
async def connected(
    port: int, buffer: int | None = None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Yields a connection that is reset at the end, as if its client was killed.

    buffer: number of received bytes that may stay unread.
    """
    plain = socket.socket()
    if buffer is not None:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    plain.setblocking(False)
    await asyncio.get_running_loop().sock_connect(plain, ("127.0.0.1", port))
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    reader, writer = await asyncio.open_connection(sock=plain, limit=buffer or 2**16)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def ask(port: int, request: bytes, sip: int = 65536, pause: float = 0.0) -> tuple[int, bytes]:
    """Returns status and body of the answer to a request that closes its connection.

    sip: number of bytes per read.
    pause: seconds between two reads.
    """
    async with connected(port) as (reader, writer):
        writer.write(request)
        raw = bytearray()
        while part := await reader.read(sip):
            raw += part
            if pause:
                await asyncio.sleep(pause)
    return parsed(bytes(raw))


def parsed(raw: bytes) -> tuple[int, bytes]:
    """Returns status and body, its chunks joined; raises ValueError for an answer that is cut off."""
    start, _, body = raw.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in start.lower():
        joined = b""
        while True:
            size, _, body = body.partition(b"\r\n")
            if not (n := int(size, 16)):
                break
            joined, body = joined + body[:n], body[n + 2 :]
        body = joined
    return int(start.split()[1]), body


def events(body: bytes) -> list[Any]:
    """Returns the objects of a stream, which must end with ``[DONE]``."""
    lines = body.decode().strip().split("\n\n")
    assert lines[-1] == "data: [DONE]", lines[-1:]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


async def until_closed(reader: asyncio.StreamReader) -> bytes:
    """Returns what comes until the connection is closed or reset."""
    got = b""
    with suppress(ConnectionResetError, BrokenPipeError):
        while part := await reader.read(65536):
            got += part
    return got
