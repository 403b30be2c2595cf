"""Without a home folder that can be written to, compiled programs are kept elsewhere, with only a warning."""

import os
import pwd
import stat
import tempfile
from pathlib import Path

import jax
import pytest
from jmoe_kernels import cache
from jmoe_kernels.cpu import build


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """Returns the temporary folder of a user whose home is a device."""
    for name in ("JMOE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", os.devnull)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_user_says_where(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.delenv("JMOE_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.user_cache() == Path("/h/.cache/jmoe")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache.user_cache() == Path("/x/jmoe")
    monkeypatch.setenv("JMOE_CACHE_DIR", str(tmp_path))
    assert cache.usable(cache.user_cache() / "xla") == tmp_path / "jmoe" / "xla"
    assert not list((tmp_path / "jmoe" / "xla").iterdir()), "trying leaves nothing"


def test_a_home_that_cannot_be_written_to(nowhere, caplog):
    folder = cache.usable(cache.user_cache() / "xla")
    assert folder == nowhere / f"jmoe-{os.getuid()}" / "xla"
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert (
        f"{os.devnull}/.cache/jmoe/xla: Not a directory" in caplog.text and str(folder.parent) in caplog.text
    )
    assert cache.usable(folder) == folder, "the next start finds what this one kept"


def test_a_user_without_a_home(nowhere, monkeypatch, caplog):
    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert cache.user_cache() == nowhere / f"jmoe-{os.getuid()}"
    assert "home directory" in caplog.text and "Traceback" not in caplog.text


@pytest.mark.parametrize("planted", ["open", "link", "file", "dangling"])
def test_a_folder_that_others_may_write_to_is_not_taken(nowhere, planted):
    theirs = nowhere / f"jmoe-{os.getuid()}"
    if planted == "open":
        theirs.mkdir()
        theirs.chmod(0o777)
    elif planted == "file":
        theirs.touch()
    else:
        theirs.symlink_to(nowhere if planted == "link" else nowhere / "absent")
    folder = cache.temporary_cache("why")
    assert folder != theirs and folder.parent == nowhere and stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_of_somebody_else_is_not_taken(nowhere, monkeypatch):
    (nowhere / "jmoe-7").mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: 7)
    if (nowhere / "jmoe-7").stat().st_uid != 7:
        assert cache.temporary_cache("why") != nowhere / "jmoe-7"


def test_what_a_read_only_image_brought_along_is_read(tmp_path, monkeypatch):
    (tmp_path / "program").touch()
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: 1 / 0)
    assert cache.usable(tmp_path) == tmp_path


def test_nothing_can_be_written_anywhere(nowhere, monkeypatch, caplog):
    monkeypatch.setattr(tempfile, "tempdir", os.devnull)
    folder = cache.user_cache() / "xla"
    assert cache.usable(folder) == folder and "not kept" in caplog.text


def test_kernels_are_built_where_they_can_be(nowhere, monkeypatch):
    """Kernels are built next to the compiled programs, or elsewhere if that folder cannot be written to."""
    tried = []

    def into(folder):
        tried.append(folder)
        folder.mkdir(parents=True)
        return folder / "jmoe.so"

    monkeypatch.setattr(build, "build", into)
    monkeypatch.setattr(build, "load", lambda path: path)
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", f"{os.devnull}/jmoe/xla")
    try:
        found = build.get_library.__wrapped__()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert tried == [Path(os.devnull) / "jmoe" / "kernels", nowhere / f"jmoe-{os.getuid()}" / "kernels"]
    assert found == tried[1] / "jmoe.so"
