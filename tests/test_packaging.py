"""The package's shape: what may import what, and that nothing is importable as ``kernels``."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = {
    "jmoe_kernels": 0,
    "units": 0,
    "reading": 1,
    "anatomy": 2,
    "techniques": 2,
    "config": 3,
    "mesh": 3,
    "moe": 4,
    "nn": 4,
    "models": 5,
    "grouping": 5,
    "offload": 5,
    "checkpoint": 6,
    "engine": 6,
    "server": 7,
    "tools": 7,
    "progress": 7,
    "flags": 8,
    "bench_flags": 9,
    "cli": 10,
}
SOURCES = sorted([*(ROOT / "jmoe").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def home(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1]


def imports(path: Path) -> set[str]:
    """Top-level imports of project modules: "moe", "jmoe_kernels", ..."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "jmoe" else [f"jmoe.{a.name}" for a in node.names]
        for name in names:
            head, _, rest = name.partition(".")
            if head == "jmoe_kernels":
                found.add(head)
            elif head == "jmoe" and rest.split(".")[0] in LAYERS:
                found.add(rest.split(".")[0])
    return found


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if home(p) in LAYERS], ids=lambda p: str(p.relative_to(ROOT))
)
def test_a_module_imports_only_from_lower_layers(path: Path):
    here = home(path)
    for target in imports(path) - {here}:
        peers = {here, target} in (
            {"moe", "nn"},
            {"models", "offload"},
            {"engine", "checkpoint"},
            {"config", "mesh"},
            {"tools", "progress"},
        )
        assert LAYERS[target] < LAYERS[here] or peers, f"{here} must not import {target}"


def test_moe_stages_do_not_import_one_another():
    allowed = {
        "types": set(),
        "routing": {"types"},
        "transport": {"types", "routing", "exchange"},
        "exchange": set(),
        "experts": {"types"},
        "binning": {"types"},
        "capacity": {"types"},
        "orders": {"tables"},
        "shuffle": {"types", "orders", "exchange"},
        "counting": {"types"},
        "npz": set(),
        "tables": set(),
        "placement": {"npz", "tables"},
    }
    for stage, may in allowed.items():
        text = (ROOT / "jmoe/moe" / f"{stage}.py").read_text()
        assert set(re.findall(r"from jmoe\.moe\.(\w+) import", text)) <= may


def test_the_host_side_of_the_engine_knows_no_jax():
    host = "request", "pages", "prefix", "dispatch", "plan", "scheduler", "text", "grammar", "grammar_tokens"
    host += "settings", "grammar_check", "grammar_child", "json_schema", "schema_keywords"
    for name in host:
        assert not re.search(r"^\s*(import|from) jax", (ROOT / f"jmoe/engine/{name}.py").read_text(), re.M)
    for path in (ROOT / "jmoe/server").glob("*.py"):
        assert not re.search(
            r"^\s*(import|from) (jax|jmoe\.(models|moe|nn|checkpoint))", path.read_text(), re.M
        )


def test_kernels_is_a_source_root_and_not_a_package():
    assert not (ROOT / "kernels/__init__.py").exists() and not (ROOT / "tests/kernels").exists()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or str(ROOT) not in str(spec.origin)


def test_files_are_short():
    long = {str(p.relative_to(ROOT)): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 350}
    assert not long
