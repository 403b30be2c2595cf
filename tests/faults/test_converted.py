"""A damaged converted directory gives the same model or is refused in one line."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.damage import CHANGES, damaged, loaded, refused
from support.models import hf_tiny

from jmoe.checkpoint import convert
from jmoe.checkpoint.converted.manifest import MANIFEST


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """Returns a converted tiny model and its parameters."""
    root = tmp_path_factory.mktemp("converted")
    hf_tiny.write_checkpoint(root / "hf", hf_tiny.hf_config())
    convert(root / "hf", root / "out")
    return root / "out", loaded(root / "out")


def files_of(directory: Path) -> list[Path]:
    return sorted(p.relative_to(directory) for p in directory.rglob("*") if p.is_file())


def test_any_converted_directory_is_the_same_model_or_refused(converted, tmp_path):
    good, parameters = converted
    names = [Path(MANIFEST), *files_of(good)]  # the manifest twice, because no sum covers it

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
    "a file that a link names": lambda out: (
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
    """Returns an edit that changes Orbax's description of a group."""

    def edit(out: Path) -> Path:
        path = next(out.rglob("_METADATA"))
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return path

    return edit


def largest(change: Callable[[bytes], bytes]):
    """Returns an edit that changes the largest file, which holds numbers."""

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
    """Damage with a right checksum in the manifest gives one line, and no traceback follows.

    Orbax reads the arrays of a group at the same time. If one fails, nobody collects the failures of the
    others.
    """
    damages = [*SIGNED.values()] * 2  # twice, because other reads end late each time
    outs = [tmp_path / str(i) for i in range(len(damages))]
    for out, damage in zip(outs, damages, strict=True):
        shutil.copytree(converted[0], out)
        path = damage(out)
        raw, manifest = path.read_bytes(), json.loads((out / MANIFEST).read_text())
        manifest["files"][str(path.relative_to(out))] = [len(raw), hashlib.sha256(raw).hexdigest()]
        (out / MANIFEST).write_text(json.dumps(manifest))
    words = [sys.executable, "-c", LOAD, *map(str, outs)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=500)
    said = done.stdout.splitlines()
    assert done.returncode == 0 and len(said) == len(outs), done
    assert all(str(out) in line for out, line in zip(outs, said, strict=True)), said
    assert "Traceback" not in done.stderr and "never retrieved" not in done.stderr, done.stderr
