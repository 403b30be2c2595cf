"""Files of arrays are written whole or not at all: after an exception, and after a kill in mid-write."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jmoe.moe import npz
from jmoe.moe.npz import save_arrays, saved_arrays

KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from jmoe.moe import npz

def write(file, **arrays):
    file.write(b"PK half of an archive")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

npz.np.savez_compressed = write
npz.save_arrays(Path(sys.argv[1]), "form", {"a": 2})
"""


def read(path: Path) -> int:
    with saved_arrays(path, "thing", "form") as arrays:
        return int(arrays["a"])


def test_a_kill_in_mid_write_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "thing.npz"
    for there_before in (False, True):
        if there_before:
            save_arrays(path, "form", {"a": 1})
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        child = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, str(path)], env=environment)
        assert child.returncode == -signal.SIGKILL
        assert path.exists() == there_before, "half a file would look like an artefact"
    assert read(path) == 1
    save_arrays(path, "form", {"a": 3})
    assert read(path) == 3


def test_an_exception_leaves_the_old_file_alone(tmp_path: Path, monkeypatch):
    path = tmp_path / "thing.npz"
    save_arrays(path, "form", {"a": 1})

    def write(file, **arrays):
        file.write(b"PK half")
        raise KeyboardInterrupt

    monkeypatch.setattr(npz.np, "savez_compressed", write)
    with pytest.raises(KeyboardInterrupt):
        save_arrays(path, "form", {"a": 2})
    assert os.listdir(tmp_path) == ["thing.npz"] and read(path) == 1


def test_a_file_behind_a_link_is_replaced_and_the_link_stays(tmp_path: Path):
    real, link = tmp_path / "real.npz", tmp_path / "link.npz"
    save_arrays(real, "form", {"a": np.int32(1)})
    link.symlink_to(real)
    save_arrays(link, "form", {"a": np.int32(2)})
    assert link.is_symlink() and read(real) == 2
