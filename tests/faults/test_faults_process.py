"""Server processes whose engine fails, or that are told to end while they start."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from support.models import hf_tiny
from support.server.fake_engine import eventually
from support.server.raw_http import events

from jmoe.cli import serve
from jmoe.cli.main import main

STREAM = {"prompt": [5, 6, 7], "max_tokens": 60, "temperature": 0, "ignore_eos": True, "stream": True}

SERVER = """
import logging, sys, time
from pathlib import Path
from jmoe.engine.build import EngineSettings, build_engine
from jmoe.engine.worker import EngineWorker
from jmoe.server.run import bind, serve
from jmoe.server.settings import ServerSettings

logging.basicConfig(level=logging.INFO)
directory, port, fails_at = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
bound = bind("127.0.0.1", port)
settings = EngineSettings(max_model_len=128, max_num_seqs=4, max_num_batched_tokens=64)
engine = build_engine(directory, settings, warm_up=False)
step, steps = engine.runner.run, 0
class Panic(BaseException): "As pyo3 has it."
kind = {"Panic": Panic, "RuntimeError": RuntimeError, "SystemExit": SystemExit}[sys.argv[4]]

def run(*given, **named):
    global steps
    steps += 1
    time.sleep(0.02)
    if steps == fails_at:
        raise kind("secret: 0xdeadbeef in /home/somebody")
    return step(*given, **named)

engine.runner.run = run
worker = EngineWorker(engine)
worker.start()
code = serve(worker, ServerSettings(), bound, directory, "tiny")
worker.close()
sys.exit(code)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    hf_tiny.write_checkpoint(directory, hf_tiny.hf_config(eos_token_id=None))
    return directory


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/ready").status_code == 200
    return False


@contextlib.contextmanager
def started(command: list[str], log: Path) -> Iterator[subprocess.Popen]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    with open(log, "wb") as file, subprocess.Popen(command, stderr=file, env=env) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def serving(
    model: Path, log: Path, port: int = 0, fails_at: int = 0, kind: str = "RuntimeError"
) -> Iterator[tuple]:
    """(process, URL) of a server with the real engine, 20 ms a step."""
    port = port or free_port()
    url = f"http://127.0.0.1:{port}"
    with started([sys.executable, "-c", SERVER, str(model), str(port), str(fails_at), kind], log) as process:
        assert eventually(lambda: answers(url) or process.poll() is not None, 60)
        assert process.poll() is None, log.read_text()
        yield process, url


@pytest.mark.parametrize("kind", ["RuntimeError", "Panic", "SystemExit"])
def test_an_engine_that_fails_ends_every_answer_with_an_error_and_then_the_process(model, tmp_path, kind):
    bodies = [STREAM, STREAM | {"n": 2}, STREAM | {"stream": False}]
    with (
        serving(model, tmp_path / "log", fails_at=30, kind=kind) as (process, url),
        ThreadPoolExecutor(3) as clients,
    ):

        def ask(body: dict) -> httpx.Response:
            return httpx.post(f"{url}/v1/completions", json=body, timeout=60)

        one, two, whole = clients.map(ask, bodies)
        with contextlib.suppress(httpx.TransportError):  # it may be gone already
            live = httpx.get(f"{url}/live")
            assert live.status_code == 503 and live.json()["error"]["code"] == "engine_dead"
        assert process.wait(10) == 1
    for stream in (one, two):
        sent = events(stream.content)
        assert len(sent) > 5 and set(sent[-1]["error"]) == {"message", "type", "param", "code"}
        assert sent[-1]["error"]["type"] == "server_error" and "error" not in sent[-2]
    assert whole.status_code in (500, 503) and whole.json()["error"]["type"] == "server_error"
    assert "secret" not in one.text + two.text + whole.text, "an exception's text may tell too much"
    log = (tmp_path / "log").read_text()
    assert "secret: 0xdeadbeef" in log and "Traceback" in log, "the log has the cause"


LOSES = """
import os, signal, time
from jmoe.faults import interrupt_ends_at_once

class Imported:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

with interrupt_ends_at_once():
    Imported()
print("a KeyboardInterrupt was ignored")
"""


def test_an_interrupt_is_not_lost_where_no_exception_gets_through(tmp_path):
    """A callback's, as the import system has many: the errors in it are ignored."""
    with started([sys.executable, "-c", LOSES], tmp_path / "log") as process:
        assert process.wait(60) == -signal.SIGINT


def test_serve_leaves_an_interrupt_to_the_system_while_it_starts(monkeypatch):
    handlers = []

    def told(path):
        handlers.append(signal.getsignal(signal.SIGINT))
        raise ValueError("enough")

    monkeypatch.setattr(serve, "read_serve_config", told)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["serve", "--config", "any.toml"]) == 2
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert handlers == [signal.SIG_DFL]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_loads_or_compiles_ends_it_at_once(model, tmp_path, number):
    """At a random moment between its start and the end of warm-up."""
    port = free_port()
    flags = ["--port", str(port), "--max-model-len", "128", "--max-num-seqs", "16"]
    command = [sys.executable, "-m", "jmoe.cli", "serve", str(model), *flags]
    with started(command, tmp_path / "log") as process:
        time.sleep(random.Random(int(number)).uniform(0.5, 3))
        process.send_signal(number)
        code = process.wait(20)
        assert code in (-signal.SIGTERM, -signal.SIGINT, 130), (code, (tmp_path / "log").read_text())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))
