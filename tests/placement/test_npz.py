"""Files of arrays are written whole or not at all, also after an exception or a kill during the write."""

import io
import os
import signal
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from jmoe.placement import npz
from jmoe.placement.npz import save_arrays, saved_arrays

KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from jmoe.placement import npz

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


def test_a_file_that_a_link_names_is_replaced_and_the_link_stays(tmp_path: Path):
    real, link = tmp_path / "real.npz", tmp_path / "link.npz"
    save_arrays(real, "form", {"a": np.int32(1)})
    link.symlink_to(real)
    save_arrays(link, "form", {"a": np.int32(2)})
    assert link.is_symlink() and read(real) == 2


def archive(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as out:
        for name, data in members.items():
            out.writestr(name, data)
    return path


def as_npy(value: object, *, shape: str | None = None) -> bytes:
    """Returns an array's bytes.

    shape: shape that the header states instead, in a text of the same length.
    """
    out = io.BytesIO()
    np.save(out, np.asarray(value))
    raw = out.getvalue()
    if shape is not None:
        start = raw.index(b"'shape': ") + 9
        end = raw.index(b"}", start)
        raw = raw[:start] + shape.encode().ljust(end - start)[: end - start] + raw[end:]
    return raw


FORM = {"format.npy": as_npy("form")}
DAMAGE = {
    "another compression": lambda p: archive(p, FORM | {"a.npy": as_npy(1)}, zipfile.ZIP_LZMA),
    "another form": lambda p: archive(p, {"format.npy": as_npy("other"), "a.npy": as_npy(1)}),
    "no array": lambda p: archive(p, FORM | {"a.npy": b"text"}),
    "an object": lambda p: archive(p, FORM | {"a.npy": as_npy(1).replace(b"'<i8'", b"'|O' ")}),
    "a huge shape": lambda p: archive(p, FORM | {"a.npy": as_npy([1, 2], shape="(99999999999,)")}),
    "a negative shape": lambda p: archive(p, FORM | {"a.npy": as_npy([1, 2], shape="(-2,)")}),
    "a shape that is none": lambda p: archive(p, FORM | {"a.npy": as_npy([1, 2], shape="(" * 12)}),
    "a shape of texts": lambda p: archive(p, FORM | {"a.npy": as_npy([1, 2], shape="('a',)")}),
    "zeros without end": lambda p: archive(p, FORM | {"a.npy": bytes(20 << 20)}),
    "a name twice": lambda p: archive(p, FORM | {"a.npy": as_npy(1), "a": as_npy(2)}),
    "nothing": lambda p: p.write_bytes(b""),
    "text": lambda p: p.write_bytes(b"PK and then some text"),
    "a folder": lambda p: p.mkdir(),
    "a pipe": lambda p: os.mkfifo(p),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_no_such_file_is_refused_in_one_line(tmp_path: Path, damage: str):
    path = tmp_path / "thing.npz"
    DAMAGE[damage](path)
    tracemalloc.start()
    with pytest.raises(ValueError, match="the thing ") as error:
        read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert peak < 2 << 20


def test_any_flipped_bit_is_noticed_or_harmless(tmp_path: Path):
    path = tmp_path / "thing.npz"
    save_arrays(path, "form", {"a": 7, "b": np.arange(50)})
    good = path.read_bytes()
    for bit in range(0, 8 * len(good), 23):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        try:
            with saved_arrays(path, "thing", "form") as arrays:
                assert int(arrays["a"]) == 7 and arrays["b"].tolist() == list(range(50))
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)


def test_an_exception_of_the_one_who_reads_is_the_files_fault(tmp_path: Path):
    path = tmp_path / "thing.npz"
    save_arrays(path, "form", {"a": np.arange(3)})
    with pytest.raises(ValueError, match=r"cannot read the thing .* IndexError: "):  # noqa: SIM117
        with saved_arrays(path, "thing", "form") as arrays:
            arrays["a"][7]


def test_what_is_nearly_all_zeros_can_be_read_again(tmp_path: Path):
    path = tmp_path / "thing.npz"
    many = np.zeros((4200, 4200), np.int8)
    many[3, 4] = 1
    save_arrays(path, "form", {"a": 7, "many": many})
    with saved_arrays(path, "thing", "form") as arrays:
        np.testing.assert_array_equal(arrays["many"], many)
