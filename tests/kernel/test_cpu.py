"""Tests the C++ kernels: every instruction set of this machine, an emulated one, and their absence."""

import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from jmoe_kernels import cpu
from jmoe_kernels.cpu import build
from jmoe_kernels.grouped_mlp import pick, why_not
from support import cpu_kernels, unread_experts

LIBRARY = cpu.get_library()
needs_compiler = pytest.mark.skipif(isinstance(LIBRARY, str), reason=f"no C++ kernels here: {LIBRARY}")


@pytest.mark.parametrize("check", cpu_kernels.CHECKS, ids=lambda c: c.__name__)
def test_every_instruction_set_equals_numpy(check, isa: str):
    check()


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX and its emulation are x86")
@pytest.mark.sanitizer
@pytest.mark.skipif(not shutil.which("g++"), reason="the sanitizer's library is looked up with g++")
def test_emulated_amx_under_the_address_sanitizer(tmp_path: Path):
    """All kernels run on all sets, every access is checked, and "plain C++" last shows a complete run."""
    # jaxlib throws exceptions: the sanitizer must find the C++ library that carries them.
    preload = [_library(name) for name in ("libasan.so", "libstdc++.so")]
    if not all(Path(found).is_absolute() for found in preload):
        pytest.skip("g++ has no address sanitizer here")
    flags = ["-fsanitize=address", "-g", "-O1", "-DJMOE_EMULATE_AMX"]
    sanitized = {"LD_PRELOAD": " ".join(preload), "ASAN_OPTIONS": "detect_leaks=0"}
    env = {**os.environ, **sanitized, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, cpu_kernels.__file__, str(tmp_path), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    ran = done.stdout.split("\n")
    assert "plain C++" in ran and (ran[0] == "AMX bfloat16" or "AVX-512 bfloat16" not in ran)


def _library(name: str) -> str:
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True)
    return found.stdout.strip()


@needs_compiler
def test_an_unknown_instruction_set_is_refused():
    assert isinstance(LIBRARY, cpu.Library)
    with pytest.raises(ValueError, match=r"'MMX' cannot run here; those that can: .*plain C\+\+"):
        LIBRARY.use("MMX")


def test_without_a_compiler_the_portable_form_serves(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler found"):
        build.build(tmp_path)
    monkeypatch.setattr(build, "get_library", lambda: "no C++ compiler found")
    name, why = pick("cpu", "bfloat16")
    assert name == "xla" and why.endswith("cannot run here: no C++ compiler found; 'xla' can")
    assert "no C++ compiler" in (why_not("cpu", "cpu", "float32") or "")


@needs_compiler
def test_a_failed_compilation_says_what_failed(tmp_path: Path):
    with pytest.raises(RuntimeError, match=r"failed: .*(unrecognized|unknown)"):
        build.build(tmp_path, ("-fno-such-flag",))
    assert not list(tmp_path.glob("*.so"))


@needs_compiler
def test_a_build_is_kept(tmp_path: Path, monkeypatch):
    assert isinstance(LIBRARY, cpu.Library)
    shutil.copy(LIBRARY.path, tmp_path)
    monkeypatch.setattr(build, "_run", lambda command: pytest.fail(f"compiled again: {command}"))
    assert build.build(tmp_path).name == LIBRARY.path.name


@needs_compiler
@pytest.mark.parametrize("damage", ["half", "empty", "one bit", "another file"])
def test_a_damaged_library_is_built_again_and_never_loaded(tmp_path: Path, monkeypatch, damage: str):
    """Loading half a library ends the process; an empty one would mean the portable kernels for ever."""
    assert isinstance(LIBRARY, cpu.Library)
    good = LIBRARY.path.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    bad = {"half": good[: len(good) // 2], "empty": b"", "one bit": bytes(flipped)}.get(damage, b"#!/bin/sh")
    (tmp_path / LIBRARY.path.name).write_bytes(bad)

    def compile_quickly(command: list[str]) -> None:
        if "-shared" in command:
            Path(command[command.index("-o") + 1]).write_bytes(good)

    monkeypatch.setattr(build, "_run", compile_quickly)
    path = build.build(tmp_path)
    assert path.name == LIBRARY.path.name and path.read_bytes() == good
    monkeypatch.setattr(build, "_run", lambda command: pytest.fail(f"compiled again: {command}"))
    assert build.build(tmp_path) == path and [p.name for p in tmp_path.iterdir()] == [path.name]


@needs_compiler
@pytest.mark.parametrize(
    "forbidden, end", [("0,1,3,5,6,7", 0), ("2", -signal.SIGSEGV)], ids=["idle", "active"]
)
def test_weights_of_idle_experts_are_not_read(forbidden: str, end: int):
    """Their pages cannot be read. The second case shows that reading one of them would be noticed."""
    command = [sys.executable, unread_experts.__file__, "2,4", forbidden]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout) == (end, "" if end else "unread\n"), done.stderr[-2000:]
