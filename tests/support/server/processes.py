"""A server of the fake engine in a process of its own: for signals, for limits of a process, for memory."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import httpx
from support.server.fake_engine import eventually

PROGRAM = """
import os, sys, threading
from support.server.fake_engine import ByteCodec, FakeEngine
from jmoe.server.run import bind, serve
from jmoe.server.settings import ServerSettings
timeout, port, holds_at = sys.argv[1:]
bound = bind("127.0.0.1", int(port))
print(bound.getsockname()[1], flush=True)
engine = FakeEngine(ByteCodec(), max_model_len=4096, pace=0.02, holds_at=int(holds_at))
threading.Thread(target=lambda: (os.read(0, 1), engine.going.set()), daemon=True).start()
sys.exit(serve(engine, ServerSettings(shutdown_timeout=float(timeout)), bound, model="fake"))
"""


def answers(url: str) -> bool:
    """Returns whether the server is ready."""
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/ready").status_code == 200
    return False


@contextlib.contextmanager
def process(
    shutdown_timeout: float = 60,
    port: int = 0,
    log: IO[bytes] | None = None,
    holds_at: int = -1,
    program: str = PROGRAM,
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Yields the server's process and its URL, after it is ready.

    log: file for its standard error.
    holds_at: number of tokens at which requests wait for ``let_go``.
    """
    command = [sys.executable, "-c", program, str(shutdown_timeout), str(port), str(holds_at)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment
    ) as server:
        try:
            assert server.stdout is not None
            url = f"http://127.0.0.1:{int(server.stdout.readline())}"
            assert eventually(lambda: answers(url))
            yield server, url
        finally:
            server.kill()


def let_go(server: subprocess.Popen[bytes]) -> None:
    """Lets the requests continue."""
    assert server.stdin is not None
    server.stdin.write(b".")
    server.stdin.flush()


def resident(pid: int) -> int:
    """Returns the bytes of memory that a process has."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
