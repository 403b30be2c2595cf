"""Tests the shape of ``scripts``: what may import what, and how large its folders and files are."""

import ast
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts"
COMMANDS = {path.stem for path in SCRIPTS.glob("*.py")}
SOURCES = [path for path in SCRIPTS.rglob("*.py") if path.parent.name != "acceptance"]
PARTS = {"gpu_checks": "gpu_check", "vs_llama_cpp": "bench_vs_llama_cpp", "studies": "study"}


def imports(path: Path) -> set[str]:
    """Returns the modules that a file imports, at its top or anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_no_script_imports_a_command():
    for path in SOURCES:
        assert not imports(path) & COMMANDS, path


def test_a_commands_own_modules_are_imported_by_it_alone():
    for path in SOURCES:
        place = path.relative_to(SCRIPTS).parts[0].removesuffix(".py")
        for folder in {name.partition(".")[0] for name in imports(path)} & PARTS.keys():
            assert place in (folder, PARTS[folder]), f"{path} imports from {folder}"


def test_a_study_imports_from_no_other_study():
    for path in (SCRIPTS / "studies").glob("*/*.py"):
        allowed = "studies.record.", f"studies.{path.parent.name}."
        found = {name for name in imports(path) if name.partition(".")[0] == "studies"}
        assert all(f"{name}.".startswith(allowed) for name in found), path


def test_the_shared_modules_import_only_one_another():
    for path in (SCRIPTS / "shared").glob("*.py"):
        assert not {name.partition(".")[0] for name in imports(path)} & PARTS.keys(), path


def test_folders_and_files_are_small():
    for folder in {path.parent for path in SOURCES}:
        entries = [entry for entry in folder.iterdir() if entry.name != "__pycache__"]
        assert len(entries) <= (20 if folder == SCRIPTS else 16), folder
    assert not [path for path in SOURCES if len(path.read_text().splitlines()) > 350]
