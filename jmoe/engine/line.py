"""The lines, one TCP connection each, on which process 0 tells the others what to run.

Not jax's ``broadcast_one_to_all``: it takes 3 ms between two processes on one CPU where a step would need
two, it keeps idle accelerators busy with waiting, and a process that ends while nothing runs goes unnoticed.
It serves once, to tell the others where process 0 listens and what a connection must know to be let in.
"""

import hmac
import json
import logging
import secrets
import socket
import struct
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from select import select
from typing import Any

import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all

from jmoe.engine.nodes import Nodes, listen
from jmoe.engine.request import EngineDead

log = logging.getLogger(__name__)
MEETING = 60  # seconds for every process to connect
TOKEN = 16  # random bytes that only the processes of this mesh know
HELLO = struct.Struct(f"<{TOKEN}sI")  # the token and the process's number
PLACE = struct.Struct(f"<{TOKEN}sH")  # the token and process 0's port
LENGTH = struct.Struct("<I")


class Line:
    """One end of a connection between process 0 and another."""

    def __init__(self, connection: socket.socket):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.connection = connection

    def read_into(self, buffer: Any) -> None:
        """Fills ``buffer``; EngineDead where the other end is gone."""
        view = memoryview(buffer).cast("B")
        while view:
            try:
                count = self.connection.recv_into(view)
            except OSError as error:
                raise EngineDead(f"the connection was lost ({error.strerror or error})") from None
            if count == 0:
                raise EngineDead("the connection was closed")
            view = view[count:]

    def read(self, count: int) -> bytes:
        self.read_into(buffer := bytearray(count))
        return bytes(buffer)

    def agree(self, facts: dict[str, Any], other: int) -> None:
        """Raises ValueError naming the first of ``facts`` that the other process has otherwise."""
        text = json.dumps(facts, default=str).encode()
        self.connection.sendall(LENGTH.pack(len(text)) + text)
        mine, theirs = json.loads(text), json.loads(self.read(*LENGTH.unpack(self.read(LENGTH.size))))
        for key in mine | theirs:
            if mine.get(key) != theirs.get(key):
                raise ValueError(
                    f"{key} is {mine.get(key)} here and {theirs.get(key)} in process {other}: "
                    "all processes take the same model and flags"
                )


def to_leader(nodes: Nodes, facts: dict[str, Any]) -> Line:
    """A follower's line to process 0, once both have found the same ``facts``."""
    place = broadcast_one_to_all(np.zeros(PLACE.size, np.uint8))
    token, port = PLACE.unpack(bytes(place))
    connection = socket.create_connection((nodes.host, port), timeout=MEETING)
    line = Line(connection)
    connection.sendall(HELLO.pack(token, nodes.rank))
    line.agree(facts, 0)
    connection.settimeout(None)  # the next request may be long in coming
    return line


class Followers:
    """Process 0's lines to all others. ``lost`` says who is gone as soon as one is."""

    def __init__(self, nodes: Nodes, facts: dict[str, Any]):
        self.lost: str | None = None
        self._closing = False
        self._lines: dict[int, Line] = {}
        token = secrets.token_bytes(TOKEN)
        with listen(nodes.host, 0) as listening:
            port = listening.getsockname()[1]
            broadcast_one_to_all(np.frombuffer(PLACE.pack(token, port), np.uint8))
            self._meet(listening, nodes, token)
        for rank, line in self._lines.items():
            line.agree(facts, rank)
            line.connection.settimeout(None)
        threading.Thread(target=self._watch, name="jmoe-followers", daemon=True).start()

    def _meet(self, listening: socket.socket, nodes: Nodes, token: bytes) -> None:
        end = time.monotonic() + MEETING
        while len(self._lines) < nodes.nnodes - 1:
            listening.settimeout(max(0.1, end - time.monotonic()))
            try:
                connection, _ = listening.accept()
            except TimeoutError:
                missing = sorted({*range(1, nodes.nnodes)} - {*self._lines})
                raise ValueError(f"process {missing[0]} did not connect within {MEETING} s") from None
            connection.settimeout(MEETING)
            line = Line(connection)
            try:
                told, rank = HELLO.unpack(line.read(HELLO.size))
            except EngineDead:
                continue
            if hmac.compare_digest(told, token):
                self._lines[rank] = line
            else:
                log.warning("a stranger's connection is refused")
                connection.close()

    def send(self, parts: Sequence[bytes]) -> None:
        """Tells every follower; EngineDead where one is gone."""
        message = b"".join(parts)
        for rank, line in self._lines.items():
            if self.lost is None:
                try:
                    line.connection.sendall(message)
                except OSError as error:
                    self._lose(rank, error)
        if self.lost is not None:
            raise EngineDead(self.lost)

    def close(self, last: bytes = b"") -> None:
        """Says ``last`` and closes the lines; a follower to which nothing is said takes it for a failure."""
        self._closing = True  # from here on, followers may go
        for line in self._lines.values():
            with line.connection, suppress(OSError):
                line.connection.sendall(last)
                line.connection.shutdown(socket.SHUT_RDWR)  # close alone waits for the watching thread
        self._lines = {}

    def _watch(self) -> None:
        """Followers say nothing more, so what can be read is the end of one."""
        lines = {line.connection: rank for rank, line in self._lines.items()}
        try:
            ended, _, _ = select(list(lines), [], [])
        except (OSError, ValueError):  # closed meanwhile
            return
        if not self._closing:
            self._lose(lines[ended[0]], None)

    def _lose(self, rank: int, error: OSError | None) -> None:
        if self.lost is None and not self._closing:
            self.lost = f"process {rank} is gone" + (f" ({error.strerror or error})" if error else "")
            log.error("%s: nothing more can run on this mesh", self.lost)
