"""Tests ``gpu_check.py`` without a GPU, with its smallest cases in the interpreters (``--dry``)."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support.aot.gpu import gpu_interpreter

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.py"


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    gpu_check = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = gpu_check  # its dataclasses look their module up
    spec.loader.exec_module(gpu_check)
    return gpu_check


def test_binning_runs_dry(tmp_path: Path, gpu_check: ModuleType):
    assert gpu_check.main(["--dry", "--out", str(tmp_path), "--sections", "binning"]) == 0
    rows = json.loads((tmp_path / "gpu_check.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["kernel", "kernel", "xla"]
    assert rows[0]["verdict"] == "1 of 1 as the reference pass" and "XLA x" in rows[1]["verdict"]


def test_quantised_forms_run_dry(tmp_path: Path, gpu_check: ModuleType):
    with gpu_interpreter():
        assert gpu_check.main(["--dry", "--out", str(tmp_path), "--sections", "codes"]) == 0
    rows = json.loads((tmp_path / "gpu_check.json").read_text())["rows"]
    assert [row["verdict"] for row in rows[:2]] == ["pass", "pass"]
    assert [row["name"] for row in rows[2:]] == [
        "bfloat16", "int8, one scale a row", "e2m1, groups of 32",
    ]  # fmt: skip


@pytest.mark.matrix
def test_all_runs_dry_and_a_failing_section_is_isolated(
    tmp_path: Path, gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    def broken(check):
        raise RuntimeError("no such kernel")

    # Binning is in Triton, which the interpreter of Mosaic GPU would take for its own.
    others = [section for section in gpu_check.SECTIONS if section.__name__ != "binning"]
    monkeypatch.setattr(gpu_check, "SECTIONS", (broken, *others))
    with gpu_interpreter():
        status = gpu_check.main(["--dry", "--out", str(tmp_path), "--commit", "abc"])
    result = json.loads((tmp_path / "gpu_check.json").read_text())
    rows = result["rows"]
    assert status == 1 and rows[0]["verdict"] == "ERROR RuntimeError: no such kernel"
    assert result["commit"] == "abc" and {row["section"] for row in rows[1:]} == {
        "limits",
        "correct",
        "engine",
        "decode",
        "offload",
        "prefill",
        "codes",
        "model",
    }
    assert not [row for row in rows[1:] if "error" in row["verdict"].lower() or "FAIL" in row["verdict"]]
    timed = [row for row in rows if row["name"] == "jmoe"]
    assert len(timed) == 3 and all(row["seconds"] > 0 for row in timed)
