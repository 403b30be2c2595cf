"""Tests that documents and docstrings name files, folders and tests that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ("jmoe", "kernels", "scripts", "tests")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
PATH = re.compile(r"`((?:\.ci|configs|docs|jmoe|kernels|scripts|tests)/[\w./-]*)`")
TEST = re.compile(r"``(test_\w+)(?:\.py)?``")
PLACEHOLDERS: set[str] = set()  # paths and names that stand for any other: none yet
DOCSTRINGS: dict[Path, list[str]] = {}
TESTS: set[str] = set()  # names of the files and of the functions of tests
for source in SOURCES:
    DOCSTRINGS[source] = []
    if source.is_relative_to(ROOT / "tests"):
        TESTS.add(source.stem)
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and source.stem in TESTS:
            TESTS.add(node.name)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            DOCSTRINGS[source].append(ast.get_docstring(node) or "")


def absent(text: str) -> list[str]:
    """Returns the paths that the text names and that do not exist."""
    return [path for path in sorted(set(PATH.findall(text)) - PLACEHOLDERS) if not (ROOT / path).exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_document_names_paths_that_exist(document: Path):
    assert not absent(document.read_text(encoding="utf-8"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_name_paths_and_tests_that_exist(folder: str):
    wrong = {}
    for path, texts in DOCSTRINGS.items():
        if path.is_relative_to(ROOT / folder):
            text = "\n".join(texts)
            unknown = set(TEST.findall(text)) - TESTS - PLACEHOLDERS
            if found := absent(text) + sorted(unknown):
                wrong[str(path.relative_to(ROOT))] = found
    assert not wrong
