"""Tests the structure of the packages: what a module may import, and how large files and folders may be."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = {  # the parts of a package, lowest first: a part imports only from itself and the parts before it
    "jmoe": (
        "jmoe_kernels", "config", "mesh", "blueprint", "param", "placement", "moe", "nn", "offload",
        "models", "checkpoint", "engine", "server", "tools", "cli",
    ),
    "jmoe.engine": (
        "faults", "page_names", "text", "grammar", "request", "reports", "schedule", "step", "offload",
        "engine", "deployment", "worker", "build", "llm", "processes",
    ),
    "jmoe.server": (
        "errors", "settings", "engine_api", "route_record", "dialects", "template", "wire", "request",
        "answer", "watch", "service", "routes", "app", "run",
    ),
    "jmoe.server.request": (
        "bounds", "fields", "schema", "body", "decoding", "tools", "conversation", "structured", "checks",
        "grammars", "prompts", "truncation", "params", "prepared", "apis",
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


def part_of(package: str, module: str) -> str | None:
    """Returns the part of ``package`` that a module belongs to, or None if it belongs to none."""
    if package == "jmoe" and module.startswith("jmoe_kernels"):
        return "jmoe_kernels"
    return module.removeprefix(f"{package}.").split(".")[0] if module.startswith(f"{package}.") else None


@pytest.mark.parametrize("package", LAYERS)
def test_every_part_of_a_package_is_in_one_layer(package: str):
    there = {part_of(package, name) for name in MODULES} - {None}
    assert there - {"jmoe_kernels"} == set(LAYERS[package]) - {"jmoe_kernels"}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_the_layers_below_it(name: str):
    for package, layers in LAYERS.items():
        if (own := part_of(package, name)) is None:
            continue
        allowed = layers[: layers.index(own) + 1]
        assert {part_of(package, other) for other in imports(MODULES[name])} - {None} <= {*allowed}


def test_a_folder_has_at_most_16_entries():
    """Only ``models`` may have more, because it has one file per family."""
    for folder in {path.parent for path in SOURCES}:
        entries = [entry for entry in folder.iterdir() if entry.name != "__pycache__"]
        assert len(entries) <= 16 or folder.name == "models", folder


def test_a_folder_of_tests_has_at_most_30_entries():
    for folder in {path.parent for path in (ROOT / "tests").rglob("*.py")}:
        assert len([entry for entry in folder.iterdir() if entry.name != "__pycache__"]) <= 30, folder


def test_the_stages_of_the_moe_layer_do_not_import_one_another():
    allowed = {
        "types": set(),
        "routing": {"types"},
        "transport": {"types", "routing"},
        "expert_leaves": set(),
        "experts": {"types", "expert_leaves"},
        "stage": {"types"},
        "binning": {"types", "stage"},
        "capacity": {"types", "stage"},
        "orders": set(),
        "shuffle": {"types", "orders", "transport"},
        "counting": {"types"},
        "decide": {"types", "routing", "counting", "binning", "capacity", "stage"},
    }
    for stage, others in allowed.items():
        text = (ROOT / "jmoe/moe" / f"{stage}.py").read_text()
        assert set(re.findall(r"from jmoe\.moe\.(\w+) import", text)) <= others


def test_the_server_and_the_host_side_of_the_engine_do_not_import_jax():
    packages = ("config", "engine/schedule", "engine/text", "engine/grammar", "server", "placement")
    host = [path for package in packages for path in (ROOT / "jmoe" / package).rglob("*.py")]
    names = ("request", "reports", "page_names", "deployment/settings")
    host += [ROOT / f"jmoe/engine/{name}.py" for name in names]
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


def test_a_file_has_at_most_350_lines():
    long = {str(p.relative_to(ROOT)): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 350}
    assert not long


def test_no_test_module_is_imported_by_another():
    """Code that several test modules use is in ``tests/support``."""
    for path in (ROOT / "tests").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) (\S+\.)?test_\w+", path.read_text(), re.M), path
