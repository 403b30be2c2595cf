"""Files that are damaged, cut or half written: read as what they are, or refused in one line."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_tiny
import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load as public_load
from safetensors.numpy import save

from jmoe.checkpoint import convert, load_model, read_config
from jmoe.checkpoint.hf_reader import HFCheckpoint
from jmoe.checkpoint.manifest import MANIFEST
from jmoe.engine.build import EngineSettings, build_engine, end_tokens
from jmoe.engine.text import TextCodec
from jmoe.mesh import make_mesh
from jmoe.models import model_config
from jmoe.server.chat_template import load_chat_template, load_turn_ends

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


def loaded(directory: Path) -> dict[str, bytes]:
    """The parameters of a model by path, as bytes."""
    model = load_model(directory, make_mesh(devices=jax.devices()[:1]))
    state = nnx.to_flat_state(nnx.state(model))
    return {str(path): np.asarray(value.get_value()).tobytes() for path, value in state}


def refused(error: ValueError, where: Path) -> bool:
    """In one line that names the place."""
    return str(where) in str(error) and "\n" not in str(error)


# ---- any bytes -------------------------------------------------------------------------------------

PLACE = st.floats(0, 1, exclude_max=True)
CHANGES = st.one_of(
    st.tuples(st.just("flip"), PLACE, st.integers(1, 255)),
    st.tuples(st.just("cut out"), PLACE, st.integers(1, 40)),
    st.tuples(st.just("insert"), PLACE, st.binary(min_size=1, max_size=9)),
    st.tuples(st.just("digit"), PLACE, st.sampled_from(b'0123456789-.eE[]{}",:')),
    st.tuples(st.just("copy"), PLACE, PLACE, st.integers(1, 60)),
    st.tuples(st.just("end"), PLACE),
    st.tuples(st.just("append"), st.binary(min_size=1, max_size=9)),
)


def damaged(data: bytes, changes: list[tuple]) -> bytes:
    out = bytearray(data)
    for what, *how in changes:
        at = int(how[0] * len(out)) if isinstance(how[0], float) else 0
        match what:
            case "flip" if out:
                out[at] ^= how[1]
            case "cut out":
                del out[at : at + how[1]]
            case "insert":
                out[at:at] = how[1]
            case "digit" if out:
                out[at] = how[1]
            case "copy":
                start = int(how[1] * len(out))
                out[at:at] = out[start : start + how[2]]
            case "end":
                del out[at:]
            case "append":
                out += how[0]
    return bytes(out)


def fuzz(examples: int):
    quick = settings(
        max_examples=examples,
        deadline=5000,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
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
    """The public reader is the oracle; where it refuses what we read (a comment that is no text, say), the
    values must be those that were written."""
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
    bundled = Path(hf_tiny.__file__).parent.parent / "jmoe" / "assets"
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


# ---- converted directories -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """A converted tiny model, and its parameters."""
    root = tmp_path_factory.mktemp("converted")
    hf_tiny.write_checkpoint(root / "hf", hf_tiny.hf_config())
    convert(root / "hf", root / "out")
    return root / "out", loaded(root / "out")


def files_of(directory: Path) -> list[Path]:
    return sorted(p.relative_to(directory) for p in directory.rglob("*") if p.is_file())


def test_any_converted_directory_is_the_same_model_or_refused(converted, tmp_path):
    good, parameters = converted
    names = [Path(MANIFEST), *files_of(good)]  # the manifest, which no sum covers, twice

    @settings(max_examples=80, deadline=None, derandomize=True)
    @given(st.sampled_from(names), st.lists(CHANGES, min_size=1, max_size=2))
    def load(name, changes):
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(good, out)
        (out / name).write_bytes(damaged((good / name).read_bytes(), changes))
        try:
            assert loaded(out) == parameters
        except ValueError as error:
            assert refused(error, out), error

    load()


def edited(change):
    def edit(out: Path) -> None:
        manifest = json.loads((out / MANIFEST).read_text())
        change(manifest)
        (out / MANIFEST).write_text(json.dumps(manifest))

    return edit


DAMAGE = {
    "no file": lambda out: (
        files_of(out / "params") and (out / "params" / files_of(out / "params")[0]).unlink()
    ),
    "no folder": lambda out: shutil.rmtree(out / "params"),
    "no manifest": lambda out: (out / MANIFEST).unlink(),
    "no config": lambda out: (out / "config.json").unlink(),
    "a size of infinity": edited(lambda m: m["files"].update({"config.json": [1e999, ""]})),
    "a name too long": edited(lambda m: m["files"].update({"x" * 300: [1, ""]})),
    "a name with a nul": edited(lambda m: m["files"].update({"x\0": [1, ""]})),
    "a name that is no name": edited(lambda m: m["files"].update({"": [1, ""]})),
    "half a character": edited(lambda m: m["files"].update({"\ud800": [1, ""]})),
    "files as a list": edited(lambda m: m.update(files=[["config.json", 1, ""]])),
    "a shape of infinity": edited(lambda m: m["parameters"].update({"norm.scale_D": [1e999]})),
    "a shape as text": edited(lambda m: m["parameters"].update({"norm.scale_D": "32"})),
    "a file behind a link": lambda out: (
        (out / "config.json").rename(out.parent / "away"),
        (out / "config.json").symlink_to(out.parent / "gone"),
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_converted_directory_is_refused(case, converted, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(converted[0], out)
    DAMAGE[case](out)
    with pytest.raises(ValueError) as error:
        loaded(out)
    assert refused(error.value, out)


LOAD = """
import gc, sys, time
from jmoe.checkpoint import load_model
from jmoe.mesh import make_mesh
for directory in sys.argv[1:]:
    try:
        load_model(directory, make_mesh())
    except ValueError as error:
        print(error)
    time.sleep(0.2)  # for reads that end late
    gc.collect()
"""


def described_as(changes: dict[str, Any]):
    """A change of what Orbax says of a group."""

    def edit(out: Path) -> Path:
        path = next(out.rglob("_METADATA"))
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return path

    return edit


def largest(change: Callable[[bytes], bytes]):
    """A change of the largest file, which holds numbers."""

    def edit(out: Path) -> Path:
        path = max((p for p in (out / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        path.write_bytes(change(path.read_bytes()))
        return path

    return edit


SIGNED = {
    "another format": described_as({"use_zarr3": True}),
    "no database": described_as({"use_ocdbt": False}),
    "no tree": described_as({"tree_metadata": {}}),
    "half a file": largest(lambda raw: raw[: len(raw) // 2]),
    "no bytes": largest(lambda raw: b""),
}


def test_damage_that_the_manifest_vouches_for_is_one_line_and_no_traceback_follows(converted, tmp_path):
    """Orbax reads a group's arrays side by side: where one fails, the others' failures are nobody's."""
    damages = [*SIGNED.values()] * 2  # which reads end late differs from time to time
    outs = [tmp_path / str(i) for i in range(len(damages))]
    for out, damage in zip(outs, damages, strict=True):
        shutil.copytree(converted[0], out)
        path = damage(out)
        raw, manifest = path.read_bytes(), json.loads((out / MANIFEST).read_text())
        manifest["files"][str(path.relative_to(out))] = [len(raw), hashlib.sha256(raw).hexdigest()]
        (out / MANIFEST).write_text(json.dumps(manifest))
    words = [sys.executable, "-c", LOAD, *map(str, outs)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    said = done.stdout.splitlines()
    assert done.returncode == 0 and len(said) == len(outs), done
    assert all(str(out) in line for out, line in zip(outs, said, strict=True)), said
    assert "Traceback" not in done.stderr and "never retrieved" not in done.stderr, done.stderr


# ---- kills -----------------------------------------------------------------------------------------

CONVERT = """
import sys
from jmoe.checkpoint import convert, orbax_io
print("ready", flush=True)
sys.stdin.readline()
convert(sys.argv[1], sys.argv[2])
print("done", flush=True)
sys.stdin.readline()
"""


def killed_convert(source: Path, target: Path, delay: float) -> bool:
    """Whether a conversion was done when its process was killed, ``delay`` seconds after it began."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", CONVERT, str(source), str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as child:
        assert child.stdout.readline() == b"ready\n"
        child.stdin.write(b"go\n")
        child.stdin.flush()
        time.sleep(delay)
        child.kill()
        done = child.stdout.read() == b"done\n"
        assert child.wait() == -signal.SIGKILL
    return done


def kill_conversions(root: Path, delays: list[float]) -> int:
    """Kills a conversion at each time and checks what it left; how many were cut short."""
    source, cut = root / "hf", 0
    config = hf_tiny.hf_config(num_hidden_layers=6)
    hf_tiny.write_checkpoint(source, config)
    want = loaded(source)
    for i, delay in enumerate(delays):
        target = root / "out"
        done = killed_convert(source, target, delay)
        left = [p for p in root.iterdir() if p not in (source, target)]
        assert len(left) <= 1, "what the conversion before had left is gone"
        if target.exists():
            assert loaded(target) == want, f"kill {i} after {delay:.2f} s"
            shutil.rmtree(target)
        else:
            assert not done
            cut += 1
        for half in left:
            try:
                assert loaded(half) == want  # killed between its last byte and its name
            except ValueError as error:
                assert refused(error, half)
    convert(source, root / "out")
    assert loaded(root / "out") == want
    assert sorted(p.name for p in root.iterdir()) == ["hf", "out"]
    return cut


def test_a_conversion_that_is_killed_leaves_nothing_that_loads(tmp_path):
    assert kill_conversions(tmp_path, [0.3, 0.8])


@pytest.mark.matrix
def test_conversions_killed_at_many_moments(tmp_path):
    rng = random.Random(5)
    assert kill_conversions(tmp_path, [rng.uniform(0.05, 2.5) for _ in range(12)])


def test_a_conversion_leaves_another_that_still_runs_alone(tmp_path):
    """Two to one target: the second does not remove the first one's work, and one of them gets the name."""
    hf_tiny.write_checkpoint(tmp_path / "hf", hf_tiny.hf_config())

    def second(done, total):
        if not (tmp_path / "out").exists():
            convert(tmp_path / "hf", tmp_path / "out")

    with pytest.raises(OSError):  # the name is taken when the first one is done
        convert(tmp_path / "hf", tmp_path / "out", progress=second)
    assert loaded(tmp_path / "out") == loaded(tmp_path / "hf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out"]


def test_weights_cut_short_while_served_change_nothing(tmp_path):
    """No file stays mapped: a mapped one that is cut would end the process with SIGBUS."""
    hf_tiny.write_checkpoint(tmp_path, hf_tiny.hf_config())
    engine = build_engine(
        tmp_path, EngineSettings(max_model_len=32, max_num_seqs=1, max_num_batched_tokens=16), warm_up=False
    )
    os.truncate(tmp_path / FILE, 10)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    engine.close()
