"""A server of this machine in a child process, for the commands that talk to one."""

import contextlib
import http.client
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn, TextIO

CHECKS = 0.1  # seconds between two looks at a server that is starting
LEAVING = 40  # seconds that a server gets to end, more than its --shutdown-timeout


def is_ready(host: str, port: int) -> bool:
    """Returns whether a server at this address takes requests."""
    connection = http.client.HTTPConnection(host, port, timeout=2)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


@contextlib.contextmanager
def started(words: Sequence[str], told: TextIO) -> Iterator[str]:
    """Yields the URL of a new server on a free port of the loopback address, and ends the server afterwards.
    It raises ValueError with the server's own words if it does not start.

    words: the words after ``jmoe serve``.
    told: where a line tells that it starts, rewritten on a terminal with the last line of its log.
    """
    port = _free_port()
    command = [sys.executable, "-m", "jmoe.cli", "serve", *words, "--port", str(port), "--host", "127.0.0.1"]
    with tempfile.TemporaryDirectory(prefix="jmoe-") as folder, _ends_as_by_exit():
        log = Path(folder) / "server.log"
        with log.open("wb") as file:
            server = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,  # Ctrl-C is for an answer, not for the server
            )
        try:
            _wait(server, port, log, told)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            try:
                server.wait(LEAVING)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _wait(server: subprocess.Popen[bytes], port: int, log: Path, told: TextIO) -> None:
    begun, is_terminal = time.monotonic(), told.isatty()
    print("jmoe: starting the server ...", end="" if is_terminal else "\n", file=told, flush=True)
    while not is_ready("127.0.0.1", port):
        if server.poll() is not None:
            print(end="\r\x1b[K" if is_terminal else "", file=told, flush=True)
            last = _last_line(log).removeprefix("jmoe: ")
            raise ValueError(last or f"the server ended with exit code {server.returncode}")
        if is_terminal:
            line = f"jmoe: starting the server, {time.monotonic() - begun:.0f} s: {_last_line(log)}"
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{line[:width]}", end="", file=told, flush=True)
        time.sleep(CHECKS)
    print(end="\r\x1b[K" if is_terminal else "", file=told, flush=True)


def _last_line(log: Path) -> str:
    lines = log.read_bytes()[-4096:].decode(errors="replace").splitlines()
    return "".join(c for c in lines[-1] if c.isprintable()) if lines else ""


@contextlib.contextmanager
def _ends_as_by_exit() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP end this process as an exit does, so that the server ends with it."""

    def leave(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]
