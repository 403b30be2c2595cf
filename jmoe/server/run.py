"""Runs the server: its socket, its limits, its signals, its end."""

import asyncio
import errno
import ipaddress
import logging
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvicorn

from jmoe.server.access import Observer
from jmoe.server.app import make_app
from jmoe.server.engine_api import EngineProtocol
from jmoe.server.protocol import protocol, wire_app
from jmoe.server.service import Service
from jmoe.server.settings import ServerSettings
from jmoe.server.traffic import log_traffic

log = logging.getLogger(__name__)
BACKLOG = 2048
POLL = 0.2  # seconds between looks at the engine and at what still runs
LAST_WORDS = 2  # seconds for answers and errors already written to reach their clients


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, not yet listening. ValueError says in one line why there is none.

    Bound before the model is loaded, so that a taken port costs no time. Port 0 picks a free one.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}: {error.strerror or error}") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _not_listening(error, host, port) from None
    return bound


def _not_listening(error: OSError, host: str, port: int) -> ValueError:
    if error.errno == errno.EADDRINUSE:
        return ValueError(f"port {port} on {host} is in use")
    return ValueError(f"cannot listen on {host} port {port}: {error.strerror or error}")


def serve(
    engine: EngineProtocol,
    settings: ServerSettings,
    bound: socket.socket | None = None,
    directory: Path | None = None,
    model: str = "model",
    observers: Sequence[Observer] = (),
) -> int:
    """Serves until SIGTERM or SIGINT; the exit code: 0, or 1 where the engine died.

    bound: from ``bind``; None binds now. directory: where the model's chat template may be. model: the name
    to serve where the settings give none. observers: told of every answer.
    Raises ValueError for a bad template or a taken port.
    The first signal ends new work, lets running answers finish for ``shutdown_timeout`` seconds and then ends
    them with an error; the second ends at once.
    """
    service = Service(engine, settings, directory, model)
    service.observers += observers
    bound = bound or bind(settings.host, settings.port)
    port = bound.getsockname()[1]
    try:
        bound.listen(BACKLOG)  # where two servers start together, both could bind and only one can listen
    except OSError as error:
        raise _not_listening(error, settings.host, port) from None
    if settings.api_key is None and not _is_loopback(settings.host):
        log.warning("listening on %s without an API key: everyone who reaches it may use it", settings.host)
    if settings.api_key is None and "*" in settings.allowed_origins:
        log.warning(
            "allowed origins are * without an API key: any page in a browser that reaches it may use it"
        )
    log.info("serving %s on http://%s:%d", service.model, settings.host, port)
    server = Server(service)
    server.run(sockets=[bound])
    service.executor.shutdown(wait=False, cancel_futures=True)
    return server.exit_code


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Server(uvicorn.Server):
    """uvicorn that drains: it goes on listening, and refusing, until running answers have finished."""

    def __init__(self, service: Service):
        settings = service.settings
        super().__init__(
            uvicorn.Config(
                wire_app(make_app(service), settings),
                http=protocol(settings),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=BACKLOG,
                timeout_graceful_shutdown=LAST_WORDS,
            )
        )
        self.service = service
        self.exit_code = 0

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Called by uvicorn's signal handlers. Not passed on: the signal would be raised again at the end."""
        self.ask_to_stop()

    def ask_to_stop(self) -> None:
        if self.service.draining:
            self.force_exit = self.should_exit = True
        self.service.draining = True

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        service = self.service
        watch = asyncio.create_task(self._watch())
        traffic = asyncio.create_task(log_traffic(service.engine, service.metrics.live))
        try:
            await super().serve(sockets)
        finally:
            watch.cancel()
            traffic.cancel()

    async def _watch(self) -> None:
        """Ends the server once it is asked to and nothing runs, or the engine is dead."""
        service, waited = self.service, 0.0
        while True:
            if not service.engine.snapshot().alive:
                log.error("the engine has stopped; the server ends")
                self.exit_code = 1
                break
            if service.draining:
                if not service.running or waited >= service.settings.shutdown_timeout:
                    break
                waited += POLL
            await asyncio.sleep(POLL)
        service.draining = True
        service.stop_running()
        self.should_exit = True
