"""Tries grammars of untrusted clients in separate processes, which a hostile one may crash (``child``)."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from jmoe.engine.grammar.child import MAX_BYTES

MAX_SECONDS = 2.0  # processor time of one grammar
STALL_SECONDS = 3.0  # time without any processor time: the process was stopped, or the machine swaps
WALL_SECONDS = 60.0  # wall time, regardless of processor time
ROOT = Path(__file__).parents[3]
MAIN = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from jmoe.engine.grammar.child import serve; serve()"
NAME = "grammar_check"  # shows the child's purpose in process lists


class TooCostly(ValueError):
    """The grammar could not be tried within its limits."""


class CheckerUnavailable(Exception):
    """No grammar can be tried at present; the next try may succeed."""


class GrammarChecker:
    """The server's side of the child. Several threads may call it at once; a child that ended or was stopped
    is replaced.

    spec: result of ``engine.grammar.tokens.tokenizer_spec``.
    """

    def __init__(self, spec: dict[str, Any]):
        self.spec = spec
        self.child: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._lock = threading.Lock()

    def check(self, source: str, seconds: float = MAX_SECONDS) -> None:
        """Raises ValueError with one line that says what is wrong with ``source``, TooCostly if compiling it
        exceeds ``seconds`` of processor time or the memory limit, and CheckerUnavailable if nothing can try
        it."""
        message = json.dumps({"source": source, "seconds": seconds}).encode() + b"\n"
        answer = self._ask(message)
        if answer is None and (answer := self._ask(message)) is None:
            raise CheckerUnavailable("the process that tries grammars does not answer")
        if "error" not in answer:
            limits = f"{MAX_SECONDS:g} s or {MAX_BYTES >> 20} MiB"
            raise TooCostly(f"it is too complex: compiling it takes more than {limits}")
        if answer["error"]:
            raise ValueError(answer["error"])

    def close(self) -> None:
        """Ends the child; it also ends by itself after this process has ended."""
        with self._lock:
            self._end()

    def _ask(self, message: bytes) -> dict[str, Any] | None:
        """Returns the answer of a fork, which has no "error" if the fork ended before it answered. It returns
        None if no fork began or the fork was stopped: the process that does not answer is killed."""
        try:
            mine, theirs = socket.socketpair()
            with theirs, self._lock:
                child = self._running()
                self._hand_over(theirs)
        except OSError as error:
            raise CheckerUnavailable(f"grammars cannot be tried now: {error}") from None
        with mine:
            try:
                begun = _line(mine, child.pid)
            except TimeoutError:
                begun = b""
            if not begun:
                with self._lock:
                    if self.child is child:
                        self._end()
                return None
            return _talk(mine, message, int(begun))

    def _hand_over(self, end: socket.socket) -> None:
        """Sends the socket to the child. If the child is gone or stopped this does not fail: then nobody
        answers on the socket."""
        assert self._control is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError, TimeoutError):
            socket.send_fds(self._control, [b"."], [end.fileno()])

    def _running(self) -> "subprocess.Popen[bytes]":
        """Returns the child, or a new one if it has ended."""
        if self.child is not None and self.child.poll() is None:
            return self.child
        self._end()
        mine, theirs = socket.socketpair()
        with theirs:
            mine.settimeout(WALL_SECONDS)
            command, quiet = [sys.executable, "-P", "-c", MAIN, NAME], subprocess.DEVNULL
            try:
                self.child = subprocess.Popen(command, stdin=theirs.fileno(), stdout=quiet, stderr=quiet)
            except OSError:
                mine.close()
                raise
        self._control = mine
        spec = json.dumps(self.spec).encode()
        mine.sendall(len(spec).to_bytes(8, "big") + spec)
        mine.settimeout(STALL_SECONDS)
        return self.child

    def _end(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self.child is not None:
            self.child.kill()
            self.child.wait()
            self.child = None


def _talk(fork: socket.socket, message: bytes, pid: int) -> dict[str, Any] | None:
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it ended and sends nothing
            fork.sendall(message)
        return json.loads(_line(fork, pid) or b"{}")
    except TimeoutError:
        os.kill(pid, signal.SIGKILL)  # it lives: its end of the socket is open
        return None


def _line(end: socket.socket, pid: int) -> bytes:
    """Reads a line from process ``pid``, which is empty if the process closed its end. Raises TimeoutError if
    the process gets no processor time any more or takes longer than ``WALL_SECONDS``."""
    line, used, deadline = b"", _ticks(pid), time.monotonic() + WALL_SECONDS
    end.settimeout(STALL_SECONDS)
    while not line.endswith(b"\n"):
        try:
            part = end.recv(1 << 16)
        except ConnectionResetError:
            return b""
        except TimeoutError:
            before, used = used, _ticks(pid)
            if used == before or time.monotonic() > deadline:
                raise
            continue
        if not part:
            return b""
        line += part
    return line


def _ticks(pid: int) -> float:
    """Returns a number that grows with the processor time of ``pid``."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:  # not Linux: only WALL_SECONDS ends it there
        return time.monotonic()
    return int(fields[11]) + int(fields[12])
