"""Process 0's only port: where the other processes join, and the way to jax's coordination service.

jax's coordinator authenticates nobody, and a client that registers under the number of an existing process
ends all processes. So it listens on the loopback address only, and connections from other machines reach it
through this gate. A process that joins gets a token; each of its later connections must begin with that
token. Nothing here is encrypted: whoever can read the network's packets can read the token.
"""

import hmac
import logging
import secrets
import socket
import struct
import threading
import time
from contextlib import suppress
from enum import IntEnum
from select import select

from jmoe.engine.request import EngineDead

log = logging.getLogger(__name__)
TOKEN = 16  # random bytes that only the processes of this mesh know
MAGIC = b"jmoe0001"
# the magic, a purpose, the process's number, its token (joining: zeros)
HELLO = struct.Struct(f"<8sBI{TOKEN}s")
ANSWER = struct.Struct(f"<8sB{TOKEN}s")  # the magic, a verdict, the token of a process that joins
GREETING = 5  # seconds within which a connection must say who it is
VISITORS = 64  # connections that have not said who they are yet; more are closed at once
JOINING = 300  # seconds that processes wait for one another to start
RETRY = 0.25  # seconds between two tries to reach process 0
CHUNK = 1 << 16  # bytes that a tunnel carries at a time


class Purpose(IntEnum):
    JOIN, TUNNEL = range(2)


class Verdict(IntEnum):
    WELCOME, TAKEN, UNKNOWN = range(3)


class Gate:
    """Process 0's end. ``meet`` returns the connections of the processes that joined.

    coordinator: port of jax's coordination service on the loopback address.
    """

    def __init__(self, listener: socket.socket, nnodes: int, coordinator: int):
        self._listener, self._nnodes, self._coordinator = listener, nnodes, coordinator
        self._members: dict[int, tuple[socket.socket, bytes]] = {}  # number -> connection, token
        self._condition = threading.Condition()
        self._is_complete = False
        self._visitor_slots = threading.BoundedSemaphore(VISITORS)
        threading.Thread(target=self._accept, name="jmoe-gate", daemon=True).start()

    def meet(self, limit: float = JOINING) -> dict[int, socket.socket]:
        """Returns the connection of every other process, by number. Raises ValueError if one does not join
        within ``limit`` seconds. Afterwards no process can join any more."""
        others = range(1, self._nnodes)
        with self._condition:
            self._condition.wait_for(lambda: all(rank in self._members for rank in others), limit)
            self._is_complete = True
            missing = [rank for rank in others if rank not in self._members]
            if missing:
                raise ValueError(f"process {missing[0]} did not join within {limit:.0f} s")
            return {rank: connection for rank, (connection, _) in self._members.items()}

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._listener.fileno() < 0:
                    return
                time.sleep(RETRY)  # no file descriptor is left, or the caller is gone already
                continue
            if self._visitor_slots.acquire(blocking=False):
                threading.Thread(target=self._visit, args=(connection,), daemon=True).start()
            else:
                connection.close()

    def _visit(self, connection: socket.socket) -> None:
        try:
            magic, purpose, rank, token = HELLO.unpack(read_within(connection, HELLO.size, GREETING))
            if magic != MAGIC:
                raise EngineDead("it does not speak jmoe's protocol")
            if purpose == Purpose.JOIN:
                self._join(connection, rank)
            else:
                self._open_tunnel(connection, rank, token)
        except (EngineDead, OSError) as error:
            log.warning("a stranger's connection is refused: %s", error)
            connection.close()
        finally:
            self._visitor_slots.release()

    def _join(self, connection: socket.socket, rank: int) -> None:
        token = secrets.token_bytes(TOKEN)
        with self._condition:
            member = self._members.get(rank)
            if not 0 < rank < self._nnodes:
                verdict = Verdict.UNKNOWN
            elif self._is_complete or (member and is_open(member[0])):
                verdict = Verdict.TAKEN
            else:
                verdict = Verdict.WELCOME
                self._members[rank] = connection, token
            answer_token = token if verdict == Verdict.WELCOME else bytes(TOKEN)
            connection.sendall(ANSWER.pack(MAGIC, verdict, answer_token))
            self._condition.notify_all()
        if verdict != Verdict.WELCOME:
            log.warning("a connection that says it is process %d is refused", rank)
            connection.close()

    def _open_tunnel(self, connection: socket.socket, rank: int, token: bytes) -> None:
        with self._condition:
            member = self._members.get(rank)
        if member is None or not hmac.compare_digest(member[1], token):
            raise EngineDead(f"it says it is process {rank} and does not know that one's token")
        coordinator = socket.create_connection(("127.0.0.1", self._coordinator), timeout=GREETING)
        carry(connection, coordinator)


def knock(host: str, port: int, rank: int, limit: float = JOINING) -> tuple[socket.socket, bytes]:
    """Returns process ``rank``'s connection to process 0, and its token. Retries until process 0 has started.

    Raises ValueError if process 0 does not answer within ``limit`` seconds, or refuses process ``rank``.
    """
    end = time.monotonic() + limit
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=GREETING)
            connection.sendall(HELLO.pack(MAGIC, Purpose.JOIN, rank, bytes(TOKEN)))
            magic, verdict, token = ANSWER.unpack(read_within(connection, ANSWER.size, GREETING))
            break
        except (OSError, EngineDead) as error:
            if time.monotonic() >= end:
                where = f"{host} port {port} (dist_init_addr)"
                raise ValueError(
                    f"process 0 did not answer at {where} within {limit:.0f} s: {error}"
                ) from None
            time.sleep(RETRY)
    if magic != MAGIC:
        raise ValueError(f"{host} port {port} (dist_init_addr) is not process 0 of jmoe")
    if verdict == Verdict.TAKEN:
        raise ValueError(f"node_rank {rank}: a process of that number has joined process 0 already")
    if verdict == Verdict.UNKNOWN:
        raise ValueError(f"node_rank {rank}: process 0 was started with a smaller nnodes")
    return connection, token


class Tunnel:
    """A follower's end: a port on the loopback address that leads to jax's coordinator in process 0."""

    def __init__(self, host: str, port: int, rank: int, token: bytes):
        self._address, self._hello = (host, port), HELLO.pack(MAGIC, Purpose.TUNNEL, rank, token)
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, name="jmoe-tunnel", daemon=True).start()

    @property
    def port(self) -> int:
        return self._listener.getsockname()[1]

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            try:
                far = socket.create_connection(self._address, timeout=GREETING)
                far.sendall(self._hello)
            except OSError:
                near.close()
                continue
            # jax ends the process if its coordinator's connection ends; the channel reports the end better.
            carry(near, far, keep_near=True)


def carry(near: socket.socket, far: socket.socket, *, keep_near: bool = False) -> None:
    """Copies what arrives at either end to the other until one ends, on two new threads.

    keep_near: whether ``near`` stays open when ``far`` ends.
    """
    for end in (near, far):
        end.settimeout(None)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def copy(source: socket.socket, to: socket.socket, close: bool) -> None:
        with suppress(OSError):
            while data := source.recv(CHUNK):
                to.sendall(data)
        if close:
            for end in (near, far):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

    threading.Thread(target=copy, args=(near, far, True), daemon=True).start()
    threading.Thread(target=copy, args=(far, near, not keep_near), daemon=True).start()


def read_within(connection: socket.socket, count: int, seconds: float) -> bytes:
    """Returns ``count`` bytes that arrive within ``seconds`` in all; raises EngineDead if they do not."""
    end, data = time.monotonic() + seconds, b""
    while len(data) < count:
        connection.settimeout(max(0.01, end - time.monotonic()))
        try:
            piece = connection.recv(count - len(data))
        except TimeoutError:
            raise EngineDead(f"it sent {len(data)} of {count} bytes in {seconds:.0f} s") from None
        if not piece:
            raise EngineDead(f"it ended after {len(data)} of {count} bytes")
        data += piece
    return data


def is_open(connection: socket.socket) -> bool:
    """Returns whether the other end has not closed the connection."""
    try:
        readable, _, _ = select([connection], [], [], 0)
        return not readable or connection.recv(1, socket.MSG_PEEK) != b""
    except OSError:
        return False
