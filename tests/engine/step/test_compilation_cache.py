"""Tests that damaged files of the compilation cache are removed, so that jax writes them again."""

import json
import os
import random
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from jmoe.engine.step.compilation_cache import INDEX, drop_damaged

GOOD = zlib.compress(random.Random(0).randbytes(3000))
NAMES = ["a-1-cache", "b-2-cache", "c-3-cache"]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    for name in NAMES:
        (tmp_path / name).write_bytes(GOOD)
    (tmp_path / "a-1-atime").write_bytes(b"of jax")
    return tmp_path


DAMAGE = {
    "half": GOOD[: len(GOOD) // 2],
    "empty": b"",
    "one bit": bytes([*GOOD[:99], GOOD[99] ^ 1, *GOOD[100:]]),
    "more": GOOD + b"x",
    "text": b"hello",
    "zeros": bytes(len(GOOD)),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("seen", [False, True])
def test_damaged_entries_are_removed(cache: Path, damage: str, seen: bool):
    if seen:
        assert drop_damaged(cache) == []
    (cache / NAMES[1]).write_bytes(DAMAGE[damage])
    assert drop_damaged(cache) == [NAMES[1]]
    assert sorted(p.name for p in cache.iterdir()) == ["a-1-atime", NAMES[0], NAMES[2], INDEX]
    assert drop_damaged(cache) == []


def test_an_entry_that_changed_into_another_whole_one_is_not_trusted(cache: Path):
    drop_damaged(cache)
    (cache / NAMES[0]).write_bytes(zlib.compress(b"another program"))
    assert drop_damaged(cache) == [NAMES[0]]


def test_what_has_not_changed_is_not_read_again(cache: Path, monkeypatch):
    drop_damaged(cache)
    read = Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: read(path) if path.name == INDEX else pytest.fail(path)
    )
    assert drop_damaged(cache) == []


@pytest.mark.parametrize("index", [b"", b"[]", b'{"a-1-cache": 3}', b"[" * 100_000, b"\xff"])
def test_a_damaged_index_means_reading_all_again(cache: Path, index: bytes):
    (cache / INDEX).write_bytes(index)
    (cache / NAMES[1]).write_bytes(b"")
    assert drop_damaged(cache) == [NAMES[1]]
    assert set(json.loads((cache / INDEX).read_text())) == {NAMES[0], NAMES[2]}


def test_no_folder_and_a_file_for_one(tmp_path: Path):
    assert drop_damaged(tmp_path / "absent") == []
    (tmp_path / "file").write_bytes(b"")
    assert drop_damaged(tmp_path / "file") == []


DAMAGED_BETWEEN = """
import sys, warnings
from pathlib import Path
import jax
from jmoe.engine.step.compilation_cache import is_whole, use_compilation_cache

folder = Path(sys.argv[1])
warnings.simplefilter("error")  # jax warns of an entry that it cannot read
run = lambda x: x * 3 + 1
for damage in (None, b"", b"text"):
    if damage is not None:
        [entry] = folder.glob("jit_run-*-cache")
        good = entry.read_bytes()
        entry.write_bytes(damage or good[: len(good) // 2])
    use_compilation_cache(folder)
    jax.clear_caches()
    def run(x): return x * 3 + 1
    assert jax.jit(run)(2) == 7
    [entry] = folder.glob("jit_run-*-cache")
    assert is_whole(entry.read_bytes())
"""


def test_jax_writes_a_damaged_program_anew(tmp_path: Path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", DAMAGED_BETWEEN, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
