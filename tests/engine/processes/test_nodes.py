"""Tests two processes of four devices each as one mesh of eight: the library, ``jmoe serve``, refusals."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from support.command_line import run
from support.models.hf_tiny import hf_config, write_checkpoint, write_tokenizer
from support.multihost_process import SIZES, generated
from support.ports import own_port

from jmoe import LLM, SamplingParams
from jmoe.checkpoint import convert
from jmoe.checkpoint.quantised.codings import Quantize
from jmoe.engine.build import build_engine
from jmoe.engine.deployment.settings import EngineSettings
from jmoe.engine.processes.nodes import Nodes
from jmoe.mesh import make_mesh

ASK = {"prompt": "several machines", "max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Writes a model: 8 experts top-2, two layers, float32, random weights; one token a byte."""
    directory = tmp_path_factory.mktemp("model")
    write_checkpoint(directory, hf_config(vocab_size=256, eos_token_id=None))
    write_tokenizer(directory)
    return directory


@pytest.fixture
def start(tmp_path):
    """Starts a process of four devices, whose output goes to ``NAME.log``."""
    started = []
    env = {"JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"}

    def start_one(name: str, *command: str) -> subprocess.Popen:
        with open(tmp_path / f"{name}.log", "w") as log:
            process = subprocess.Popen(
                [sys.executable, *command], env=os.environ | env, stdout=log, stderr=log
            )
        started.append(process)
        return process

    yield start_one
    for process in started:
        process.kill()
        process.wait()


def ended(tmp_path: Path, **processes: subprocess.Popen) -> None:
    """Waits for processes to end, and asserts that their status is 0."""
    for name, process in processes.items():
        try:
            status = process.wait(timeout=500)
        except subprocess.TimeoutExpired:
            status = "still runs"
        assert status == 0, (name, status, (tmp_path / f"{name}.log").read_text()[-3000:])


@pytest.mark.parametrize(
    ("method", "moe"),
    [
        (None, {}),
        pytest.param("int4", {}, marks=pytest.mark.matrix),
        pytest.param("int8", {"offload": {"slots_per_layer": 1}}, marks=pytest.mark.matrix),
    ],
    ids=str,
)
def test_two_processes_generate_what_one_device_does(model, start, tmp_path, method, moe: dict):
    """Quantised weights are those of a conversion; one device quantises the same while it loads."""
    converted = tmp_path / "converted"
    convert(model, converted, quantize=method and Quantize(method))
    address, program = (
        f"127.0.0.1:{own_port()}",
        str(Path(__file__).parents[2] / "support" / "multihost_process.py"),
    )
    given = str(converted), str(tmp_path), json.dumps(moe)
    pair = {f"p{rank}": start(f"p{rank}", program, str(rank), address, *given) for rank in (0, 1)}
    engine = build_engine(model, EngineSettings(quantization=method, **SIZES), warm_up=False)
    want = generated(engine)
    engine.close()
    ended(tmp_path, **pair)
    leader, follower = (json.loads((tmp_path / f"{name}.json").read_text()) for name in pair)
    assert leader["tokens"] == want["tokens"] and leader["counts"] == want["counts"]
    tolerance = 5e-4 if method else 1e-4  # each of two ranks rounds its part of an activation to int16
    np.testing.assert_allclose(leader["logprobs"], want["logprobs"], atol=tolerance)
    for (whole, here), (_, there) in zip(leader["held"], follower["held"], strict=True):
        assert (here, there) in ((whole // 2, whole // 2), (whole, whole))
    experts = sum(whole for whole, here in leader["held"] if here < whole)
    assert "offload" in moe or experts > 0.5 * sum(whole for whole, _ in leader["held"])


@pytest.fixture
def serve_both(model, start, tmp_path):
    """Starts two processes that serve ``model`` together; process 1 has its flags from a file."""

    def serve(**sizes: int) -> tuple[subprocess.Popen, subprocess.Popen, str, str]:
        address, port = f"127.0.0.1:{own_port()}", own_port()
        flags = {
            "data_parallel_size": 2,
            "expert_parallel_size": 4,
            "attention": "tp",
            "nnodes": 2,
            "dist_init_addr": address,
            **SIZES,
            **sizes,
        }
        config = tmp_path / "serve.toml"
        config.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in (flags | {"node_rank": 1}).items()))
        with open(config, "a") as file:
            file.write('[moe]\nkernel = "xla"\n')  # no C++ library to compile first
        spelled = [word for k, v in flags.items() for word in (f"--{k.replace('_', '-')}", str(v))]
        command = ("-m", "jmoe.cli", "serve", str(model))
        spelled += ["--node-rank", "0", "--moe-config", '{"kernel": "xla"}', "--port", str(port)]
        p0 = start("p0", *command, *spelled)
        p1 = start("p1", *command, "--config", str(config))
        base, end = f"http://127.0.0.1:{port}", time.monotonic() + 500
        while not answers(f"{base}/ready"):
            alive = p0.poll() is None and p1.poll() is None and time.monotonic() < end
            assert alive, [(tmp_path / f"{name}.log").read_text()[-3000:] for name in ("p0", "p1")]
            time.sleep(0.2)
        return p0, p1, base, address

    return serve


def ask(base: str, **fields: object) -> Any:
    request = urllib.request.Request(
        f"{base}/v1/completions", json.dumps(ASK | fields).encode(), {"Content-Type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=300)


@pytest.mark.matrix
def test_serve_answers_for_both_and_ends_both(model, serve_both, tmp_path):
    """A follower that receives a signal to end waits for process 0.

    A stranger that speaks jax's protocol, and says that it is process 1, changes nothing.
    """
    p0, p1, base, address = serve_both()
    llm = LLM(model, warm_up=False, **SIZES)
    want = llm.generate([ASK["prompt"]], SamplingParams(max_tokens=6, temperature=0.0))[0].outputs[0]
    llm.close()
    register = (
        "import sys; from jax._src.lib import _jax\n"
        "c = _jax.get_distributed_runtime_client(sys.argv[1], 1, init_timeout=3, use_compression=False)\n"
        "c.connect()"
    )
    stranger = subprocess.run([sys.executable, "-c", register, address], capture_output=True, timeout=300)
    assert stranger.returncode != 0
    p1.send_signal(signal.SIGTERM)
    with ask(base) as answer:
        assert json.load(answer)["choices"][0]["text"] == want.text
    p0.send_signal(signal.SIGTERM)
    ended(tmp_path, p0=p0, p1=p1)
    log = (tmp_path / "p1.log").read_text()
    assert "process 1 of 2: runs what process 0 runs; serves no HTTP" in log
    assert "process 1 of 2: process 0 has ended" in log
    assert "a stranger's connection is refused" in (tmp_path / "p0.log").read_text()


@pytest.mark.matrix
def test_streams_end_with_an_error_event_where_a_process_stops(serve_both, tmp_path):
    p0, p1, base, _ = serve_both(max_model_len=128)
    with ask(base, stream=True, max_tokens=100, ignore_eos=True) as stream:
        events = [stream.readline()]
        p1.send_signal(signal.SIGSTOP)
        events += stream.read().split(b"\n\n")
    events = [e.strip() for e in events if e.strip()]
    assert events[-1] == b"data: [DONE]"
    assert json.loads(events[-2].removeprefix(b"data: "))["error"]["code"] == "engine_dead", events[-3:]
    assert p0.wait(timeout=120) == 1
    assert "process 1 is gone" in (tmp_path / "p0.log").read_text()


@pytest.mark.matrix
def test_the_others_end_where_process_0_is_killed(serve_both, tmp_path):
    p0, p1, _, _ = serve_both()
    p0.kill()
    assert p1.wait(timeout=120) == 1
    assert "process 1 ends without process 0" in (tmp_path / "p1.log").read_text()


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
        return True
    except OSError:
        return False


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--node-rank 1", "node_rank is for several processes: it needs nnodes of at least 2"),
        ("--dist-init-addr h:1", "dist_init_addr is for several processes: it needs nnodes of at least 2"),
        ("--nnodes 0", "nnodes must be at least 1, got 0"),
        ("--nnodes 2 --dist-init-addr h:1", "nnodes 2 needs node_rank, this process's number from 0 to 1"),
        (
            "--nnodes 2 --node-rank 2 --dist-init-addr h:1",
            "node_rank must be from 0 to nnodes - 1 = 1, got 2",
        ),
        (
            "--nnodes 2 --node-rank -1 --dist-init-addr h:1",
            "node_rank must be from 0 to nnodes - 1 = 1, got -1",
        ),
        ("--nnodes 2 --node-rank 0", "nnodes 2 needs dist_init_addr, HOST:PORT of process 0"),
        ("--nnodes 2 --node-rank 0 --dist-init-addr h", "dist_init_addr must be HOST:PORT, got 'h'"),
        ("--nnodes 2 --node-rank 1 --dist-init-addr h:99999", "must be HOST:PORT, got 'h:99999'"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(capsys, flags, message):
    code, out, err = run(capsys, "serve", *flags.split())
    assert code == 2 and out == "" and err.count("\n") == 1 and message in err


def test_values_of_a_file_are_checked_too():
    with pytest.raises(ValueError, match="nnodes must be a whole number, got '2'"):
        Nodes("2", 0, "h:1")  # type: ignore[arg-type]
    assert (Nodes(2, 1, "[::1]:80").host, Nodes(2, 1, "[::1]:80").port) == ("::1", 80)


def test_a_mesh_leaves_no_process_out(monkeypatch):
    devices = [SimpleNamespace(process_index=i // 4) for i in range(8)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="takes 4 of 8 devices and leaves process 1 of 2 without any"):
        make_mesh(expert=4)
