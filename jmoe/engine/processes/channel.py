"""Channels, one TCP connection each, on which process 0 sends the others what to run.

jax's ``broadcast_one_to_all`` would do that too, but it takes 3 ms between two processes on one CPU where a
step would need two, it keeps idle accelerators busy with waiting, and a process that ends while nothing runs
goes unnoticed. Both ends of a channel send a sign of life every second: silence shows that a process has
stopped or its machine is gone.
"""

import json
import logging
import socket
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from jmoe.engine.processes.rendezvous import JOINING, Gate
from jmoe.engine.request import EngineDead

log = logging.getLogger(__name__)
BEAT = 1  # seconds between two signs of life
SILENCE = 10  # seconds without one after which a process counts as lost
LENGTH = struct.Struct("<I")
FACTS = 1 << 20  # bytes of settings and configuration at most


class Channel:
    """One end of a connection between process 0 and another process."""

    def __init__(self, connection: socket.socket):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(JOINING)  # the other end may wait for further processes to join
        self.connection = connection
        self._send_lock = threading.Lock()
        self._close_event = threading.Event()

    def send(self, data: bytes) -> None:
        """Sends all of ``data``, never between the bytes of another message; raises OSError if nobody
        reads."""
        with self._send_lock:
            self.connection.sendall(data)

    def read_into(self, buffer: Any) -> None:
        """Fills ``buffer``; raises EngineDead if the other end is gone or silent."""
        view = memoryview(buffer).cast("B")
        while view:
            try:
                count = self.connection.recv_into(view)
            except TimeoutError:
                raise EngineDead(f"it was silent for {SILENCE} s") from None
            except OSError as error:
                raise EngineDead(f"the connection was lost ({error.strerror or error})") from None
            if count == 0:
                raise EngineDead("the connection was closed")
            view = view[count:]

    def read(self, count: int) -> bytes:
        self.read_into(buffer := bytearray(count))
        return bytes(buffer)

    def agree(self, facts: dict[str, Any], rank: int) -> None:
        """Raises ValueError naming the first of ``facts`` that differs in the other process."""
        text = json.dumps(facts, default=str).encode()
        self.send(LENGTH.pack(len(text)) + text)
        (length,) = LENGTH.unpack(self.read(LENGTH.size))
        if length > FACTS:
            raise EngineDead(f"process {rank} sent {length} bytes of settings; the limit is {FACTS}")
        mine, theirs = json.loads(text), json.loads(self.read(length))
        for key in mine | theirs:
            if mine.get(key) != theirs.get(key):
                raise ValueError(
                    f"{key} is {mine.get(key)} here and {theirs.get(key)} in process {rank}: "
                    "all processes take the same model and flags"
                )

    def keep_alive(self, sign: bytes) -> None:
        """Sends ``sign`` every ``BEAT`` seconds from now on, and treats ``SILENCE`` seconds without anything
        from the other end as its loss."""
        self.connection.settimeout(SILENCE)

        def beat() -> None:
            with suppress(OSError):
                while not self._close_event.wait(BEAT):
                    self.send(sign)

        threading.Thread(target=beat, name="jmoe-beat", daemon=True).start()

    def close(self) -> None:
        self._close_event.set()
        with self.connection, suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)  # close alone waits for a thread that reads


class Followers:
    """Process 0's channels to all other processes. ``loss`` says which one is gone, as soon as one is.

    gate: gate where the processes join; it is closed with the channels.
    facts: what must be equal in all processes; a ValueError names what is not.
    sign: message that only says that process 0 lives.
    """

    def __init__(self, gate: Gate, facts: dict[str, Any], sign: bytes):
        self.loss: str | None = None
        self._is_closing = False
        self._loss_lock = threading.Lock()
        self._gate, self._channels = gate, {}
        try:
            self._channels = {rank: Channel(connection) for rank, connection in gate.meet().items()}
            for rank, channel in self._channels.items():
                self._agree(rank, channel, facts)
        except Exception:
            self.close()
            raise
        for rank, channel in self._channels.items():
            channel.keep_alive(sign)
            threading.Thread(target=self._watch, args=(rank, channel), name="jmoe-watch", daemon=True).start()

    def send(self, buffers: Sequence[bytes]) -> None:
        """Sends every follower a message; raises EngineDead if one is gone."""
        message = b"".join(buffers)
        for rank, channel in self._channels.items():
            if self.loss is None:
                try:
                    channel.send(message)
                except OSError as error:
                    self._report_loss(rank, str(error.strerror or error))
        if self.loss is not None:
            raise EngineDead(self.loss)

    def close(self, last_message: bytes = b"") -> None:
        """Sends ``last_message`` and closes the channels. A follower that gets no last message assumes a
        failure."""
        self._is_closing = True  # from here on, followers may go
        for channel in self._channels.values():
            with suppress(OSError):
                channel.send(last_message)
            channel.close()
        self._channels = {}
        self._gate.close()

    def _agree(self, rank: int, channel: Channel, facts: dict[str, Any]) -> None:
        try:
            channel.agree(facts, rank)
        except (EngineDead, OSError) as error:
            raise EngineDead(f"process {rank} is gone ({error})") from None

    def _watch(self, rank: int, channel: Channel) -> None:
        """Reads a follower's signs of life (it sends nothing else) until it is lost."""
        try:
            while True:
                channel.read(1)
        except EngineDead as error:
            self._report_loss(rank, str(error))

    def _report_loss(self, rank: int, cause: str) -> None:
        with self._loss_lock:
            if self.loss is None and not self._is_closing:
                self.loss = f"process {rank} is gone ({cause})"
                log.error("%s: nothing more can run on this mesh", self.loss)
