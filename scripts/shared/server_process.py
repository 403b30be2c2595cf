"""Starts a server as a process of its own, waits until it answers, and ends it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal


@dataclass
class Served:
    """A running server.

    process: the leader of the server's process group.
    url: its URL.
    model: the model's name in a request.
    extra: more fields of a request's body.
    prompt_form: the form of a prompt that it takes.
    """

    process: subprocess.Popen
    url: str
    model: str
    extra: dict[str, Any]
    prompt_form: Literal["ids", "text"]

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(
    words: list[str],
    port: int,
    log: Path,
    *,
    model: str,
    extra: dict[str, Any],
    prompt_form: Literal["ids", "text"] = "text",
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Served]:
    """Yields the server once it answers /health. Otherwise raises SystemExit with the end of its log."""
    url = f"http://127.0.0.1:{port}"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server ends with this process
    with log.open("wb") as file:
        process = subprocess.Popen(
            words,
            stdout=file,
            stderr=file,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
            start_new_session=True,
        )
    served = Served(process, url, model, extra, prompt_form)
    try:
        wait_for(served, log)
        yield served
    finally:
        with contextlib.suppress(ProcessLookupError):
            served.signal(signal.SIGCONT)
            served.signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            served.signal(signal.SIGKILL)


def wait_for(served: Served, log: Path, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and served.process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{served.url}/health", timeout=2):
            return
        time.sleep(0.05)
    raise SystemExit(f"{served.url} does not serve: {log.read_text(errors='replace')[-1000:]}")
