"""Tests server processes whose engine fails, or that get the signal to end while they start."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from support.models import hf_tiny
from support.ports import own_port
from support.server.fake_engine import eventually
from support.server.processes import answers
from support.server.raw_http import events

from jmoe.cli import serve
from jmoe.cli.main import main

STREAM = {"prompt": [5, 6, 7], "max_tokens": 60, "temperature": 0, "ignore_eos": True, "stream": True}

SERVER = """
import logging, sys, time
from pathlib import Path
from jmoe.engine.build import build_engine
from jmoe.engine.deployment.settings import EngineSettings
from jmoe.engine.worker import EngineWorker
from jmoe.server.run import bind, serve
from jmoe.server.settings import ServerSettings

logging.basicConfig(level=logging.INFO)
directory, kind = Path(sys.argv[1]), sys.argv[2]
bound = bind("127.0.0.1", 0)
print(bound.getsockname()[1], flush=True)
settings = EngineSettings(max_model_len=128, max_num_seqs=4, max_num_batched_tokens=64)
engine = build_engine(directory, settings, warm_up=False)
step, steps = engine.step, 0
class Panic(BaseException): "As pyo3 has it."
kind = {"Panic": Panic, "RuntimeError": RuntimeError, "SystemExit": SystemExit}[kind]

def stepping():
    "Begins when all four answers are asked for, and fails at the thirtieth step from there."
    global steps
    if not steps and len(engine.scheduler.waiting) < 4:
        time.sleep(0.01)
        return False
    steps += 1
    if steps == 30:
        raise kind("secret: 0xdeadbeef in /home/somebody")
    return step()

engine.step = stepping
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


@contextlib.contextmanager
def started(command: list[str], log: Path) -> Iterator[subprocess.Popen]:
    """Yields a process. The test reads its standard output and writes its standard input."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with open(log, "wb") as file, subprocess.Popen(command, stderr=file, env=env, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def serving(model: Path, log: Path, kind: str) -> Iterator[tuple]:
    """Yields (process, URL) of a server with the real engine, which fails."""
    with started([sys.executable, "-c", SERVER, str(model), kind], log) as process:
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        assert eventually(lambda: answers(url) or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield process, url


@pytest.mark.parametrize("kind", ["RuntimeError", "Panic", "SystemExit"])
def test_an_engine_that_fails_ends_every_answer_with_an_error_and_then_the_process(model, tmp_path, kind):
    bodies = [STREAM, STREAM | {"n": 2}, STREAM | {"stream": False}]
    with (
        serving(model, tmp_path / "log", kind) as (process, url),
        ThreadPoolExecutor(3) as clients,
    ):

        def ask(body: dict) -> httpx.Response:
            return httpx.post(f"{url}/v1/completions", json=body, timeout=60)

        one, two, whole = clients.map(ask, bodies)
        with contextlib.suppress(httpx.TransportError):  # the server may already have ended
            live = httpx.get(f"{url}/live", timeout=60)
            assert live.status_code == 503 and live.json()["error"]["code"] == "engine_dead"
        assert process.wait(60) == 1
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
from jmoe.engine.faults import interrupt_ends_at_once

class Imported:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

with interrupt_ends_at_once():
    Imported()
print("a KeyboardInterrupt was ignored")
"""


def test_an_interrupt_is_not_lost_where_no_exception_gets_through(tmp_path):
    """An interrupt is not lost in a callback whose errors are ignored, as in the import system."""
    with started([sys.executable, "-c", LOSES], tmp_path / "log") as process:
        assert process.wait(60) == -signal.SIGINT


def test_serve_leaves_an_interrupt_to_the_system_while_it_starts(monkeypatch):
    handlers = []

    def record(path):
        handlers.append(signal.getsignal(signal.SIGINT))
        raise ValueError("enough")

    monkeypatch.setattr(serve, "read_serve_config", record)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["serve", "--config", "any.toml"]) == 2
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert handlers == [signal.SIG_DFL]


STARTS = """
import sys
from jmoe.cli import serve
from jmoe.cli.main import main

stage, words = sys.argv[1], sys.argv[2:]

class Bars:
    "Stops the start when it reports the stage for the first time."
    __enter__ = lambda self: self
    __exit__ = lambda self, *error: None

    def __call__(self, reported, done, total):
        if reported == stage:
            print("there", flush=True)
            sys.stdin.read()

serve.Bars = Bars
sys.exit(main(words))
"""


@pytest.mark.parametrize("stage", ["load", "compile"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_loads_or_compiles_ends_it_at_once(model, tmp_path, number, stage):
    port = own_port()
    flags = ["--port", str(port), "--max-model-len", "128", "--max-num-seqs", "16"]
    command = [sys.executable, "-c", STARTS, stage, "serve", str(model), *flags]
    with started(command, tmp_path / "log") as process:
        assert process.stdout.readline() == b"there\n", (tmp_path / "log").read_text()
        process.send_signal(number)
        assert process.wait(60) == -number, (tmp_path / "log").read_text()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))
