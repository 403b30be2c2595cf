"""A file that is damaged, cut or half written is read as it is, or refused in one line."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load as public_load
from safetensors.numpy import save
from support.damage import CHANGES, damaged, loaded, refused
from support.models import hf_tiny

from jmoe.checkpoint import convert, read_config
from jmoe.checkpoint.facts import end_tokens
from jmoe.checkpoint.hf.reader import HFCheckpoint
from jmoe.engine.build import build_engine
from jmoe.engine.deployment.settings import EngineSettings
from jmoe.engine.text.codec import TextCodec
from jmoe.models import model_config
from jmoe.server.template.chat_template import load_chat_template, load_turn_ends

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


# ---- any bytes -------------------------------------------------------------------------------------


def fuzz(examples: int):
    quick = settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: quick(given(st.lists(CHANGES, min_size=1, max_size=3))(test))


TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array([1.5, -2], np.float16),
    "none": np.zeros((0, 4), np.float32),
    "one": np.array(7, np.float32),
}
GOOD = save(TENSORS, {"format": "pt"})


def read_all(directory: Path) -> dict[str, np.ndarray]:
    with HFCheckpoint(directory) as checkpoint:
        out = {name: np.empty(info.shape, np.float32) for name, info in checkpoint.tensors.items()}
        for name, values in out.items():
            checkpoint.read_into(name, values)
    return out


@fuzz(400)
def test_any_safetensors_is_read_as_by_the_public_reader_or_refused(tmp_path, changes):
    """Any safetensors file is read with the values of the public reader, or is refused.

    If the public reader refuses what we read (for example a comment that is no text), the values must be
    those that were written.
    """
    data = damaged(GOOD, changes)
    (tmp_path / FILE).write_bytes(data)
    try:
        ours = read_all(tmp_path)
    except ValueError as error:
        assert refused(error, tmp_path / FILE), error
        return
    try:
        want = public_load(data)
    except Exception:
        want = TENSORS
    assert ours.keys() == want.keys()
    for name, values in ours.items():
        np.testing.assert_array_equal(values, want[name].astype(np.float32))


@fuzz(150)
def test_any_index_of_shards_leads_to_the_same_values_or_is_refused(tmp_path, changes):
    (tmp_path / "one.safetensors").write_bytes(save({"a": TENSORS["a"]}))
    (tmp_path / "two.safetensors").write_bytes(save({"b": TENSORS["b"]}))
    text = json.dumps({"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})
    (tmp_path / INDEX).write_bytes(damaged(text.encode(), changes))
    try:
        ours = read_all(tmp_path)
    except ValueError as error:
        assert refused(error, tmp_path), error
        return
    assert ours.keys() == {"a", "b"}
    np.testing.assert_array_equal(ours["a"], TENSORS["a"])


@fuzz(200)
def test_any_config_is_a_config_or_refused(tmp_path, changes):
    text = json.dumps(hf_tiny.hf_config())
    (tmp_path / "config.json").write_bytes(damaged(text.encode(), changes))
    try:
        cfg = read_config(tmp_path)
    except ValueError as error:
        assert refused(error, tmp_path / "config.json"), error
    else:
        assert cfg.num_experts >= cfg.num_experts_per_tok >= 1


@fuzz(100)
def test_any_tokenizer_or_chat_template_file_is_read_or_refused(tmp_path, changes):
    bundled = Path(hf_tiny.__file__).parents[3] / "jmoe" / "assets"
    tokenizer = min(bundled.rglob("tokenizer.json"), key=lambda p: p.stat().st_size)
    (tmp_path / "tokenizer.json").write_bytes(damaged(tokenizer.read_bytes(), changes))
    texts = {
        "tokenizer_config.json": {"chat_template": [{"name": "default", "template": "{{ messages }}"}]},
        "generation_config.json": {"stop_strings": ["\n"], "eos_token_id": [1, 2]},
    }
    for name, value in texts.items():
        (tmp_path / name).write_bytes(damaged(json.dumps(value).encode(), changes))
    cfg = model_config(hf_tiny.hf_config())
    reads = (lambda d: TextCodec(d, 10**6), lambda d: end_tokens(d, cfg), load_chat_template, load_turn_ends)
    for read in reads:
        try:
            read(tmp_path)
        except ValueError as error:
            assert str(tmp_path) in str(error)


# ---- kills -----------------------------------------------------------------------------------------

CONVERT = """
import sys
from jmoe.checkpoint import convert

def report(done, total):
    print("group", flush=True)
    sys.stdin.readline()

convert(sys.argv[1], sys.argv[2], progress=report)
print("done", flush=True)
sys.stdin.read()
"""


class Conversion:
    """A process that converts. After each group of parameters it waits for the permission to continue."""

    def __init__(self, source: Path, target: Path):
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", CONVERT, str(source), str(target)]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)

    def next_report(self) -> str:
        """Returns what the process reports next: that a group is written, or that it is done."""
        return self.child.stdout.readline().decode().strip()

    def go_on(self) -> None:
        self.child.stdin.write(b"go\n")
        self.child.stdin.flush()

    def kill(self) -> None:
        with self.child as child:
            child.kill()
        assert child.returncode == -signal.SIGKILL


def check_left(root: Path, want: dict[str, bytes]) -> bool:
    """Returns whether a killed conversion gave ``root / "out"`` its name.

    It checks that a directory with this name is whole. It also checks that what is next to it comes only from
    this conversion, and is refused if it is not whole.
    """
    target = root / "out"
    left = [p for p in root.iterdir() if p not in (root / "hf", target)]
    assert len(left) <= 1, "what the conversion before had left is gone"
    for half in left:
        try:
            assert loaded(half) == want  # it was killed between its last byte and its name
        except ValueError as error:
            assert refused(error, half)
    if not target.exists():
        return False
    assert loaded(target) == want
    return True


@pytest.fixture
def source(tmp_path) -> dict[str, bytes]:
    """Returns the parameters of a checkpoint of several groups at ``tmp_path / "hf"``."""
    hf_tiny.write_checkpoint(tmp_path / "hf", hf_tiny.hf_config())
    return loaded(tmp_path / "hf")


def check_next(root: Path, want: dict[str, bytes]) -> None:
    """Checks that the next conversion is whole and removes what the killed ones left."""
    convert(root / "hf", root / "out")
    assert loaded(root / "out") == want
    assert sorted(p.name for p in root.iterdir()) == ["hf", "out"]


def test_a_conversion_that_is_killed_leaves_nothing_that_loads(source, tmp_path):
    """A killed conversion leaves nothing that loads.

    It is killed after each group that it writes, the last one too, and after its last report.
    """
    groups, done = 0, False
    while not done:
        conversion = Conversion(tmp_path / "hf", tmp_path / "out")
        for _ in range(groups):
            assert conversion.next_report() == "group"
            conversion.go_on()
        done = conversion.next_report() == "done"
        conversion.kill()
        assert check_left(tmp_path, source) == done
        groups += 1
    assert groups > 2
    shutil.rmtree(tmp_path / "out")
    check_next(tmp_path, source)


def test_the_next_conversion_removes_what_a_killed_one_left(source, tmp_path):
    conversion = Conversion(tmp_path / "hf", tmp_path / "out")
    assert conversion.next_report() == "group"
    conversion.kill()
    assert not check_left(tmp_path, source) and len(list(tmp_path.iterdir())) == 2
    check_next(tmp_path, source)


@pytest.mark.matrix
def test_conversions_killed_at_many_moments(source, tmp_path):
    """A conversion may be killed at any moment. The moments differ from machine to machine."""
    rng = random.Random(5)
    for _ in range(12):
        conversion = Conversion(tmp_path / "hf", tmp_path / "out")
        assert conversion.next_report() == "group"
        for _ in range(rng.randrange(4)):
            conversion.go_on()
        time.sleep(rng.uniform(0, 0.3))
        conversion.kill()
        if check_left(tmp_path, source):
            shutil.rmtree(tmp_path / "out")
    check_next(tmp_path, source)


def test_a_conversion_leaves_another_that_still_runs_alone(tmp_path):
    """Of two conversions to one target, the second leaves the first one's work, and one gets the name."""
    hf_tiny.write_checkpoint(tmp_path / "hf", hf_tiny.hf_config())

    def second(done, total):
        if not (tmp_path / "out").exists():
            convert(tmp_path / "hf", tmp_path / "out")

    with pytest.raises(OSError):  # the first one has the name when it is done
        convert(tmp_path / "hf", tmp_path / "out", progress=second)
    assert loaded(tmp_path / "out") == loaded(tmp_path / "hf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out"]


def test_weights_cut_short_while_served_change_nothing(tmp_path):
    """No file stays mapped after loading, because a cut mapped file would end the process with SIGBUS."""
    hf_tiny.write_checkpoint(tmp_path, hf_tiny.hf_config())
    engine = build_engine(
        tmp_path, EngineSettings(max_model_len=32, max_num_seqs=1, max_num_batched_tokens=16), warm_up=False
    )
    os.truncate(tmp_path / FILE, 10)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    engine.close()
