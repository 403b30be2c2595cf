"""Tests the package's shape: what may import what, and that nothing can be imported as ``kernels``."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = {  # a part of a package imports only from the parts before it in its list
    "jmoe": (
        "jmoe_kernels", "config", "mesh", "blueprint", "param", "placement", "moe", "nn", "offload",
        "models", "checkpoint", "engine", "server", "tools", "cli",
    ),
    "jmoe.engine": (
        "faults", "page_names", "text", "grammar", "request", "schedule", "step", "offload", "engine",
        "deployment", "lowering", "worker", "build", "llm", "processes",
    ),
    "jmoe.server": (
        "errors", "settings", "engine_api", "template", "wire", "request", "answer", "watch", "service",
        "routes", "app", "run",
    ),
    "jmoe.server.request": (
        "bounds", "schema", "body", "decoding", "dialects", "tools", "structured", "checks", "grammars",
        "messages", "prompts", "params",
    ),
}  # fmt: skip
SOURCES = sorted([*(ROOT / "jmoe").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def module(path: Path) -> str:
    source = path.relative_to(ROOT / "kernels" if path.is_relative_to(ROOT / "kernels") else ROOT)
    return ".".join(source.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for path in SOURCES}


def imports(path: Path) -> set[str]:
    """Returns the project's modules that a file imports, at its top or anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            wholes = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= wholes or {node.module}
    return {name for name in found if name.split(".")[0] in ("jmoe", "jmoe_kernels")}


def room(name: str, house: str) -> str | None:
    """Returns the part of ``house`` in which a module is, None outside of it and for the house itself."""
    if house == "jmoe" and name.startswith("jmoe_kernels"):
        return "jmoe_kernels"
    return name.removeprefix(f"{house}.").split(".")[0] if name.startswith(f"{house}.") else None


@pytest.mark.parametrize("house", FLOORS)
def test_every_room_has_its_floor(house: str):
    there = {room(name, house) for name in MODULES} - {None}
    assert there - {"jmoe_kernels"} == set(FLOORS[house]) - {"jmoe_kernels"}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_lower_floors(name: str):
    for house, floors in FLOORS.items():
        if (here := room(name, house)) is None:
            continue
        below = floors[: floors.index(here) + 1]
        assert {found for found in (room(other, house) for other in imports(MODULES[name])) if found} <= {
            *below
        }


def test_folders_hold_what_one_look_takes_in():
    """A folder has 16 entries at most. Only ``models`` may have more, because it has one file a family."""
    for folder in {path.parent for path in SOURCES}:
        entries = [entry for entry in folder.iterdir() if entry.name != "__pycache__"]
        assert len(entries) <= 16 or folder.name in ("models",), folder


def test_moe_stages_do_not_import_one_another():
    allowed = {
        "types": set(),
        "routing": {"types"},
        "transport": {"types", "routing"},
        "expert_leaves": set(),
        "experts": {"types", "expert_leaves"},
        "binning": {"types"},
        "capacity": {"types"},
        "orders": set(),
        "shuffle": {"types", "orders", "transport"},
        "counting": {"types"},
        "decide": {"types", "routing", "counting", "binning", "capacity"},
    }
    for stage, may in allowed.items():
        text = (ROOT / "jmoe/moe" / f"{stage}.py").read_text()
        assert set(re.findall(r"from jmoe\.moe\.(\w+) import", text)) <= may


def test_the_host_side_of_the_engine_and_the_server_know_no_jax():
    rooms = ("engine/schedule", "engine/text", "engine/grammar", "server", "placement")
    host = [path for room in rooms for path in (ROOT / "jmoe" / room).rglob("*.py")]
    host += [ROOT / f"jmoe/engine/{name}.py" for name in ("request", "page_names", "deployment/settings")]
    for path in host:
        assert not re.search(r"^\s*(import|from) jax\b", path.read_text(), re.M), path
    for path in (ROOT / "jmoe/server").rglob("*.py"):
        assert not re.search(r"^\s*(import|from) jmoe\.(models|moe|nn|checkpoint)", path.read_text(), re.M), (
            path
        )


def test_kernels_is_a_source_root_and_not_a_package():
    assert not (ROOT / "kernels/__init__.py").exists() and not (ROOT / "tests/kernels").exists()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or str(ROOT) not in str(spec.origin)


def test_files_are_short():
    long = {str(p.relative_to(ROOT)): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 350}
    assert not long


def test_no_test_module_is_imported_by_another():
    """No test module imports another. Code that several of them use is in ``tests/support``."""
    for path in (ROOT / "tests").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) (\S+\.)?test_\w+", path.read_text(), re.M), path
