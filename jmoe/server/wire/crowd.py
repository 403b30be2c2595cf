"""How many connections there may be, and what becomes of one more.

A connection takes one of the process's descriptors, and without one nothing else goes on: no accept, no
grammar, no file. So some are kept back, and of these some for probes.
"""

import errno
import logging
import os
import resource
from typing import Any, Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jmoe.server.errors import unavailable

log = logging.getLogger(__name__)
MAX_DESCRIPTORS = 65536
MAX_CONNECTIONS = 10_000
LACKING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)  # what the system may have again later
PROBES = frozenset({"/live", "/ready", "/health", "/ping"})
Entry = Literal["served", "probes", "refused"]


def raise_descriptors() -> int:
    """Descriptors that this process may have open, once it may have as many as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return most
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (OSError, ValueError) as error:  # some systems have a lower limit than they tell
        log.warning("the limit of %d open descriptors cannot be raised: %s", soft, error)
        return soft
    return most


def open_descriptors() -> int:
    """Those below 1024: new ones get the lowest numbers."""
    return sum(map(_is_open, range(1024)))


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


class Crowd:
    """The connections of one server, of which ``limit`` are served.

    When there are more, the one that has waited longest without a request goes. Where all are busy, ``spare``
    new ones are served if they ask for the server's health, and answered 503 otherwise.
    """

    PATIENCE = 2.0  # seconds that one of the spare ones may take to ask

    def __init__(self, limit: int, spare: int):
        self.limit, self.spare = limit, spare
        self.idle: dict[Any, None] = {}  # connections without a request, the oldest first
        self.full = False

    @classmethod
    def of_descriptors(cls) -> "Crowd":
        """Of what is left beside the descriptors that are open now, and those kept back."""
        most = raise_descriptors()
        kept = min(max(most // 8, 24), 512)
        return cls(max(1, min(MAX_CONNECTIONS, most - open_descriptors() - kept)), kept // 6)

    def enter(self, connection: Any, count: int) -> Entry:
        """What becomes of a new connection. count: with it."""
        if count <= self.limit:
            self.full = self.full and count > self.limit // 2  # then it may be told again
            return "served"
        if not self.full:
            log.warning("%d connections: new ones take the place of idle ones, or are refused", self.limit)
            self.full = True
        oldest = next(iter(self.idle), None)
        if oldest is not None:
            del self.idle[oldest]
            oldest.connections.discard(oldest)
            oldest.transport.abort()
            return "served"
        return "probes" if count <= self.limit + self.spare else "refused"

    def only_probes(self, app: ASGIApp) -> ASGIApp:
        """The application for one of the spare connections, which ends with its first answer."""

        async def probe(scope: Scope, receive: Receive, send: Send) -> None:
            async def send_and_close(message: Message) -> None:
                if message["type"] == "http.response.start":
                    message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
                await send(message)

            if scope["path"] in PROBES:
                closing = [*scope["headers"], (b"connection", b"close")]  # so that nothing else is announced
                return await app({**scope, "headers": closing}, receive, send_and_close)
            error = unavailable(f"{self.limit} connections are served at a time", "too_many_connections")
            await error.response()(scope, receive, send_and_close)

        return probe
