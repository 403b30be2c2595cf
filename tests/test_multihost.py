"""Two processes of four devices each as one mesh of eight: the library, ``jmoe serve``, what is refused."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from hf_tiny import hf_config, write_checkpoint, write_tokenizer
from multihost_process import SIZES, generated
from test_cli import run

from jmoe import LLM, SamplingParams
from jmoe.checkpoint import convert
from jmoe.engine import gate
from jmoe.engine import line as line_module
from jmoe.engine.build import EngineSettings, build_engine
from jmoe.engine.gate import Gate, Tunnel, knock
from jmoe.engine.line import Followers, Line
from jmoe.engine.nodes import Nodes, free_port
from jmoe.engine.request import EngineDead
from jmoe.mesh import make_mesh

ASK = {"prompt": "several machines", "max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """8 experts top-2, two layers, float32, random weights; one token a byte."""
    directory = tmp_path_factory.mktemp("model")
    write_checkpoint(directory, hf_config(vocab_size=256, eos_token_id=None))
    write_tokenizer(directory)
    return directory


@pytest.fixture
def start(tmp_path):
    """Starts a process of four devices; what it says goes to ``NAME.log``."""
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
    """Waits for processes to end, and holds them to status 0."""
    for name, process in processes.items():
        try:
            status = process.wait(timeout=180)
        except subprocess.TimeoutExpired:
            status = "still runs"
        assert status == 0, (name, status, (tmp_path / f"{name}.log").read_text()[-3000:])


def test_two_processes_generate_what_one_device_does(model, start, tmp_path):
    converted = tmp_path / "converted"
    convert(model, converted)
    address, program = f"127.0.0.1:{free_port()}", str(Path(__file__).parent / "multihost_process.py")
    pair = {
        f"p{rank}": start(f"p{rank}", program, str(rank), address, str(converted), str(tmp_path))
        for rank in (0, 1)
    }
    engine = build_engine(model, EngineSettings(**SIZES), warm_up=False)
    want = generated(engine)
    engine.close()
    ended(tmp_path, **pair)
    leader, follower = (json.loads((tmp_path / f"{name}.json").read_text()) for name in pair)
    assert leader["tokens"] == want["tokens"] and leader["counts"] == want["counts"]
    np.testing.assert_allclose(leader["logprobs"], want["logprobs"], atol=1e-4)
    for (whole, here), (_, there) in zip(leader["held"], follower["held"], strict=True):
        assert (here, there) in ((whole // 2, whole // 2), (whole, whole))
    experts = sum(whole for whole, here in leader["held"] if here < whole)
    assert experts > 0.5 * sum(whole for whole, _ in leader["held"])


@pytest.fixture
def serve_both(model, start, tmp_path):
    """Two processes that serve ``model`` together, and where; process 1 has its flags from a file."""

    def serve(**sizes: int) -> tuple[subprocess.Popen, subprocess.Popen, str, str]:
        address, port = f"127.0.0.1:{free_port()}", free_port()
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
        base, end = f"http://127.0.0.1:{port}", time.monotonic() + 240
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
    return urllib.request.urlopen(request, timeout=60)


@pytest.mark.matrix
def test_serve_answers_for_both_and_ends_both(model, serve_both, tmp_path):
    """A follower that is told to end waits for process 0. A stranger that speaks jax's protocol, and says it
    is process 1, changes nothing."""
    p0, p1, base, address = serve_both()
    llm = LLM(model, warm_up=False, **SIZES)
    want = llm.generate([ASK["prompt"]], SamplingParams(max_tokens=6, temperature=0.0))[0].outputs[0]
    llm.close()
    register = (
        "import sys; from jax._src.lib import _jax\n"
        "c = _jax.get_distributed_runtime_client(sys.argv[1], 1, init_timeout=3, use_compression=False)\n"
        "c.connect()"
    )
    stranger = subprocess.run([sys.executable, "-c", register, address], capture_output=True, timeout=60)
    assert stranger.returncode != 0
    p1.send_signal(signal.SIGTERM)
    with ask(base) as answer:
        assert json.load(answer)["choices"][0]["text"] == want.text
    p0.send_signal(signal.SIGTERM)
    ended(tmp_path, p0=p0, p1=p1)
    told = (tmp_path / "p1.log").read_text()
    assert "process 1 of 2: runs what process 0 runs; serves no HTTP" in told
    assert "process 1 of 2: process 0 has ended" in told
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
    assert p0.wait(timeout=30) == 1
    assert "process 1 is gone" in (tmp_path / "p0.log").read_text()


@pytest.mark.matrix
def test_the_others_end_where_process_0_is_killed(serve_both, tmp_path):
    p0, p1, _, _ = serve_both()
    p0.kill()
    assert p1.wait(timeout=30) == 1
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


@pytest.fixture
def meet():
    """Both ends of one line, as (followers, line); an end that is refused is its exception instead."""
    ends: list[Any] = []

    def meet_with(near: dict, far: dict, strangers: Callable[[int], None] = lambda port: None):
        listening = socket.create_server(("127.0.0.1", 0))
        port = listening.getsockname()[1]

        def lead() -> Followers:
            return Followers(Gate(listening, 2, 1), near, b"S")

        def follow() -> Line:
            line = Line(knock("127.0.0.1", port, 1)[0])
            ends.append(line)
            line.agree(far, 0)
            line.live(b"s")
            return line

        with ThreadPoolExecutor(2) as pool:
            leading = pool.submit(lead)
            strangers(port)
            following = pool.submit(follow)
            found = [end.exception(timeout=30) or end.result() for end in (leading, following)]
        ends.extend(end for end in found if isinstance(end, Followers))
        return found

    yield meet_with
    for end in ends:
        end.close()


def say(port: int, *pieces: bytes) -> bytes:
    """What a connection that sends ``pieces`` and then nothing is answered until it is closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as stranger:
        for piece in pieces:
            stranger.sendall(piece)
        stranger.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            return stranger.recv(100)
    return b""


def wait_for(holds: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    assert holds()


def test_strangers_are_refused_and_the_processes_meet_all_the_same(meet, caplog):
    hello = partial(gate.HELLO.pack, gate.MAGIC)

    def strangers(port: int) -> None:
        assert say(port, bytes(gate.HELLO.size)) == b""  # not jmoe's protocol
        assert say(port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n") == b""
        assert say(port, b"") == b""
        assert say(port, hello(gate.Purpose.TUNNEL, 1, bytes(gate.TOKEN))) == b""  # before anybody has joined
        refused = gate.ANSWER.unpack(say(port, hello(gate.Purpose.JOIN, 2, bytes(gate.TOKEN))))
        assert refused == (gate.MAGIC, gate.Verdict.UNKNOWN, bytes(gate.TOKEN))

    followers, line = meet({"a": [1, 2]}, {"a": (1, 2)}, strangers)
    followers.send([b"ab", b"c"])
    assert line.read(3) == b"abc" and followers.lost is None
    assert "it does not speak jmoe's protocol" in caplog.text
    assert "it says it is process 1 and does not know that one's token" in caplog.text


def test_a_number_is_given_once_and_is_free_again_where_its_process_ended_before_all_had_joined():
    listening = socket.create_server(("127.0.0.1", 0))
    port, door = listening.getsockname()[1], Gate(listening, 3, 1)
    first, token = knock("127.0.0.1", port, 1)
    with pytest.raises(ValueError, match="node_rank 1: a process of that number has joined"):
        knock("127.0.0.1", port, 1)
    with pytest.raises(ValueError, match="node_rank 3: process 0 was started with a smaller nnodes"):
        knock("127.0.0.1", port, 3)
    first.close()
    again, other = knock("127.0.0.1", port, 1)
    second, _ = knock("127.0.0.1", port, 2)
    assert token != other and sorted(door.meet(30)) == [1, 2]
    again.close()
    with pytest.raises(ValueError, match="has joined process 0 already"):  # the meeting is over
        knock("127.0.0.1", port, 1)
    second.close()
    door.close()


def test_slow_strangers_hold_nobody(monkeypatch, meet, caplog):
    """They trickle a byte at a time, and take every place for connections that have said nothing yet."""
    monkeypatch.setattr(gate, "GREETING", 1)
    monkeypatch.setattr(gate, "VISITORS", 4)
    open_ones: list[socket.socket] = []

    def strangers(port: int) -> None:
        open_ones.extend(socket.create_connection(("127.0.0.1", port)) for _ in range(8))

    followers, line = meet({}, {}, strangers)
    followers.send([b"x"])
    assert line.read(1) == b"x"
    wait_for(lambda: caplog.text.count("it sent 0 of") >= 4)
    for stranger in open_ones:
        stranger.close()


def test_a_meeting_that_is_not_complete_says_who_is_missing():
    door = Gate(socket.create_server(("127.0.0.1", 0)), 3, 1)
    with pytest.raises(ValueError, match="process 1 did not join within 0 s"):
        door.meet(0.01)
    door.close()
    with pytest.raises(ValueError, match=r"process 0 did not answer at 127.0.0.1 port \d+ \(dist_init"):
        knock("127.0.0.1", free_port(), 1, limit=0.01)


def test_a_tunnel_leads_to_the_coordinator_and_stays_open_where_it_ends():
    coordinator, listening = (socket.create_server(("127.0.0.1", 0)) for _ in range(2))
    port = listening.getsockname()[1]
    door = Gate(listening, 2, coordinator.getsockname()[1])
    connection, token = knock("127.0.0.1", port, 1)
    with socket.create_connection(("127.0.0.1", Tunnel("127.0.0.1", port, 1, token).port)) as near:
        near.sendall(b"question")
        far, _ = coordinator.accept()
        assert far.recv(8) == b"question"
        far.sendall(b"answer")
        assert near.recv(6) == b"answer"
        far.close()
        near.settimeout(0.2)
        with pytest.raises(TimeoutError):  # else jax would end the process before its line can say why
            near.recv(1)
    connection.close()
    door.close()


def test_a_lost_follower_is_noticed(meet, caplog):
    followers, line = meet({}, {})
    line.close()
    wait_for(lambda: followers.lost)
    assert "process 1 is gone (the connection was closed): nothing more can run on this mesh" in caplog.text
    with pytest.raises(EngineDead, match="process 1 is gone"):
        followers.send([b"d"])


def test_a_process_that_says_nothing_any_more_is_lost_to_both_ends(monkeypatch, meet):
    monkeypatch.setattr(line_module, "SILENCE", 0.5)
    monkeypatch.setattr(line_module, "BEAT", 60)  # as a stopped process
    followers, line = meet({}, {})
    wait_for(lambda: followers.lost)
    assert "process 1 is gone (it was silent for" in str(followers.lost)
    with pytest.raises(EngineDead, match="it was silent for"):
        line.read(1)


def test_signs_of_life_keep_a_line(monkeypatch, meet):
    monkeypatch.setattr(line_module, "SILENCE", 2)
    monkeypatch.setattr(line_module, "BEAT", 0.05)
    followers, line = meet({}, {})
    assert line.read(60) == b"S" * 60 and followers.lost is None


def test_process_0_may_end_with_a_last_word_or_without(meet):
    followers, line = meet({}, {})
    followers.close(b"bye")
    assert line.read(3) == b"bye" and followers.lost is None
    with pytest.raises(EngineDead, match="the connection was closed"):
        line.read(1)


def test_other_flags_in_another_process_are_refused_by_both(meet):
    near, far = meet({"model": "m", "max_num_seqs": 8}, {"model": "m", "max_num_seqs": 4})
    assert str(near).startswith("max_num_seqs is 8 here and 4 in process 1:")
    assert str(far).startswith("max_num_seqs is 4 here and 8 in process 0:")


def test_another_process_that_sends_no_settings_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        far = socket.create_connection(listening.getsockname())
        line = Line(listening.accept()[0])
    far.sendall(line_module.LENGTH.pack(1 << 31))
    with pytest.raises(EngineDead, match="sent 2147483648 bytes of settings; the limit is 1048576"):
        line.agree({}, 1)
    line.close()
    far.close()
