"""The limit on connections, and the handling of connections beyond it.

A connection takes one of the process's descriptors, and without a free descriptor nothing else works: no
accept, no grammar, no file. So some are reserved, and some of these for probes.
"""

import errno
import logging
import os
import resource
from collections.abc import Collection
from typing import Any, Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jmoe.server.errors import unavailable

log = logging.getLogger(__name__)
MAX_DESCRIPTORS = 65536
MAX_CONNECTIONS = 10_000
RESOURCE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)  # may succeed again later
SPARE_TIMEOUT = 2.0  # seconds that a spare connection may take to send its request
Entry = Literal["served", "probes", "refused"]


def raise_descriptors() -> int:
    """Raises the limit of open descriptors as far as the system allows, and returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return most
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (OSError, ValueError) as error:  # some systems have a lower limit than they report
        log.warning("the limit of %d open descriptors cannot be raised: %s", soft, error)
        return soft
    return most


def open_descriptors() -> int:
    """Returns the number of open descriptors below 1024: new ones get the lowest numbers."""
    return sum(map(_is_open, range(1024)))


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


class ConnectionLimit:
    """The limit on one server's connections, of which ``max_connections`` are served.

    Beyond the limit, the connection that has been idle longest is closed. If none is idle, up to
    ``num_spare`` new connections are accepted: health probes are served, all other requests get a 503.
    """

    def __init__(self, max_connections: int, num_spare: int):
        self.max_connections, self.num_spare = max_connections, num_spare
        self.idle: dict[Any, None] = {}  # connections without a request, the oldest first
        self.is_full = False

    @classmethod
    def from_descriptors(cls) -> "ConnectionLimit":
        """Returns the limit that the descriptors allow which are neither open now nor reserved."""
        most = raise_descriptors()
        kept = min(max(most // 8, 24), 512)
        return cls(max(1, min(MAX_CONNECTIONS, most - open_descriptors() - kept)), kept // 6)

    def enter(self, connection: Any, count: int) -> Entry:
        """Decides how a new connection is handled.

        count: number of connections including it.
        """
        if count <= self.max_connections:
            self.is_full = self.is_full and count > self.max_connections // 2  # then it may be logged again
            return "served"
        if not self.is_full:
            text = "%d connections: new ones take the place of idle ones, or are refused"
            log.warning(text, self.max_connections)
            self.is_full = True
        oldest = next(iter(self.idle), None)
        if oldest is not None:
            del self.idle[oldest]
            oldest.connections.discard(oldest)
            oldest.transport.abort()
            return "served"
        return "probes" if count <= self.max_connections + self.num_spare else "refused"

    def only_probes(self, app: ASGIApp, probe_paths: Collection[str]) -> ASGIApp:
        """Returns the application for a spare connection, which is closed after its first answer.

        probe_paths: paths of the health probes, which ``app`` answers.
        """

        async def probe(scope: Scope, receive: Receive, send: Send) -> None:
            async def send_and_close(message: Message) -> None:
                if message["type"] == "http.response.start":
                    message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
                await send(message)

            if scope["path"] in probe_paths:
                closing = [*scope["headers"], (b"connection", b"close")]  # so that no keep-alive is announced
                return await app({**scope, "headers": closing}, receive, send_and_close)
            message = f"{self.max_connections} connections are served at a time"
            error = unavailable(message, "too_many_connections")
            await error.response()(scope, receive, send_and_close)

        return probe
