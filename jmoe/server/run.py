"""Runs the server: its socket, its limits, its signals and its shutdown."""

import asyncio
import contextlib
import errno
import gc
import ipaddress
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import Receive, Scope, Send

from jmoe.server.app import make_app
from jmoe.server.engine_api import EngineProtocol
from jmoe.server.routes.table import ROUTES
from jmoe.server.service import Service
from jmoe.server.settings import ServerSettings
from jmoe.server.watch.answered import Observer
from jmoe.server.watch.totals import log_traffic
from jmoe.server.wire.connection_limit import RESOURCE_ERRORS, ConnectionLimit
from jmoe.server.wire.protocol import protocol, wire_app

log = logging.getLogger(__name__)
BACKLOG = 2048
CHECK_INTERVAL = 0.2  # seconds between two checks of the engine and of the running answers
LAST_WORDS = 2  # seconds for answers and errors already written to reach their clients


def bind(host: str, port: int) -> socket.socket:
    """Returns a bound socket, not yet listening. A ValueError says in one line why it cannot be bound.

    The socket is bound before the model is loaded, so that a taken port costs no time. Port 0 picks a free
    one.
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
    server_socket: socket.socket | None = None,
    directory: Path | None = None,
    model: str = "model",
    observers: Sequence[Observer] = (),
) -> int:
    """Serves until SIGTERM, SIGINT or SIGHUP. It returns the exit code: 0, or 1 if the engine died.

    It raises ValueError for a bad template or a taken port. The first signal ends new work, lets running
    answers finish for ``shutdown_timeout`` seconds and then ends them with an error; the second ends the
    server at once.

    server_socket: socket from ``bind``; None binds one now.
    directory: model directory, which may hold a chat template.
    model: served model name if the settings have none.
    observers: functions that are called with every ended answer.
    """
    service = Service(engine, settings, directory, model)
    service.observers += observers
    server_socket = server_socket or bind(settings.host, settings.port)
    port = server_socket.getsockname()[1]
    try:
        server_socket.listen(
            BACKLOG
        )  # if two servers start together, both could bind and only one can listen
    except OSError as error:
        raise _not_listening(error, settings.host, port) from None
    if settings.api_key is None and not _is_loopback(settings.host):
        log.warning("listening on %s without an API key: everyone who reaches it may use it", settings.host)
    if settings.api_key is None and "*" in settings.allowed_origins:
        log.warning(
            "allowed origins are * without an API key: any page in a browser that reaches it may use it"
        )
    log.info("%s", service.chat)
    log.info("serving %s on http://%s:%d", service.model, settings.host, port)
    server = Server(service)
    gc.collect()
    gc.freeze()  # a model's objects are many and stay: scanning them again takes tenths of a second
    server.run(sockets=[server_socket])
    closing = threading.Thread(target=service.close, name="jmoe-closing", daemon=True)
    closing.start()
    closing.join(LAST_WORDS)
    return server.exit_code


def without_threads(code: int) -> int:
    """Returns ``code`` once the threads that Python waits for have ended. If one goes on, the process exits
    here without waiting for it: a supervisor that restarts a server waits for its end."""
    end = time.monotonic() + LAST_WORDS
    others = [t for t in threading.enumerate() if t is not threading.current_thread() and not t.daemon]
    for thread in others:
        thread.join(max(end - time.monotonic(), 0))
    going = [thread.name for thread in others if thread.is_alive()]
    if going:
        log.warning("the process ends without its threads %s", ", ".join(going))
        logging.shutdown()
        os._exit(code)
    return code


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _log_failure(task: asyncio.Task) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("what logs the traffic failed", exc_info=task.exception())


def _log_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Logs an error that no task waits for. An accept without a descriptor is tried again in a second."""
    error = context.get("exception")
    if isinstance(error, OSError) and error.errno in RESOURCE_ERRORS:
        log.error("%s: %s", context.get("message"), error.strerror)
    else:
        loop.default_exception_handler(context)


class Server(uvicorn.Server):
    """A uvicorn server that drains: it listens, and refuses, until the running answers have finished."""

    def __init__(self, service: Service, connection_limit: ConnectionLimit | None = None):
        settings = service.settings
        self.app = wire_app(make_app(service), settings)
        self.loop: asyncio.AbstractEventLoop | None = None
        connection_limit = connection_limit or ConnectionLimit.from_descriptors()
        probe_paths = {route.path for route in ROUTES if route.is_probe}
        super().__init__(
            uvicorn.Config(
                self._quietly,
                http=protocol(settings, connection_limit, probe_paths),
                loop="asyncio",  # ``protocol`` relies on its transports and handling of lacking descriptors
                interface="asgi3",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                # This many connections are accepted at once, see startup.
                backlog=max(1, min(BACKLOG, connection_limit.num_spare // 2)),
                timeout_keep_alive=settings.keep_alive,
                timeout_graceful_shutdown=LAST_WORDS,
            )
        )
        self.service = service
        self.exit_code = 0

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Handles a signal; uvicorn's signal handlers call it. It does not pass the signal on: it would be
        raised again at the end."""
        self.ask_to_stop()

    def ask_to_stop(self) -> None:
        if self.service.is_draining:
            self.force_exit = self.should_exit = True
            if self.loop is not None:
                self.loop.call_soon_threadsafe(self._drop_connections)
        self.service.is_draining = True

    def _drop_connections(self) -> None:
        """Aborts all connections; their requests then end like those whose clients left."""
        for connection in [*self.server_state.connections]:
            connection.transport.abort()

    async def _quietly(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the application; its requests may be cancelled at the end without a traceback."""
        try:
            await self.app(scope, receive, send)
        except asyncio.CancelledError:
            if not self.should_exit:
                raise

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for each in sockets or ():
            each.listen(BACKLOG)  # the system may queue more connections than are accepted at once
        asyncio.get_running_loop().set_exception_handler(_log_loop_error)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        service, self.loop = self.service, asyncio.get_running_loop()
        watch = asyncio.create_task(self._watch())
        watch.add_done_callback(self._watch_ended)
        traffic = asyncio.create_task(log_traffic(service.engine, service.metrics.totals))
        traffic.add_done_callback(_log_failure)
        try:
            await super().serve(sockets)
        finally:
            watch.cancel()
            traffic.cancel()
            await asyncio.gather(watch, traffic, return_exceptions=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures SIGHUP too, which a closing terminal sends, unless it is ignored (nohup)."""
        before = signal.getsignal(signal.SIGHUP)
        if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN:
            with super().capture_signals():
                yield
            return
        signal.signal(signal.SIGHUP, self.handle_exit)
        try:
            with super().capture_signals():
                yield
        finally:
            signal.signal(signal.SIGHUP, before)

    def _watch_ended(self, watch: asyncio.Task) -> None:
        """Stops the server if the watch failed: without it a dead engine or a signal would go unnoticed."""
        if not watch.cancelled() and watch.exception() is not None:
            log.critical("the server's watch ended", exc_info=watch.exception())
            self.exit_code = 1
            self.should_exit = True

    async def _watch(self) -> None:
        """Ends the server when the engine is dead, or when it drains and no answer runs any more."""
        service, waited = self.service, 0.0
        while True:
            if not service.engine.snapshot().is_alive:
                log.error("the engine has stopped; the server ends")
                self.exit_code = 1
                break
            if service.is_draining:
                if not service.generations or waited >= service.settings.shutdown_timeout:
                    break
                waited += CHECK_INTERVAL
            await asyncio.sleep(CHECK_INTERVAL)
        service.is_draining = True
        service.stop_running()
        self.should_exit = True
