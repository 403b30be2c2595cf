"""Tests that docstrings quote names that exist."""

import ast
import builtins
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [path for room in ("jmoe", "kernels", "scripts") for path in sorted((ROOT / room).rglob("*.py"))]
PLACES = {part for path in SOURCES for part in path.relative_to(ROOT).with_suffix("").parts}
FOREIGN = {
    *(
        "with",
        "shard_map",
        "device_put",
        "as_text",
        "memory_analysis",
        "broadcast_one_to_all",
        "llama_decode",
    ),
    *("prompt_logprobs", "max_tokens", "ignore_eos", "tool_choice", "kv_memory", "max_num_seqs"),  # settings
    *(
        "affinity",
        "popularity",
        "oea",
        "lfu",
        "tp",
        "tensor",
        "traffic",
        "remote_assignments",
    ),  # values of settings
    *("_s", "_hbm"),  # ends of names
}


def defined(tree: ast.Module) -> set[str]:
    """Returns every name that the file defines or imports, or that is a word in a one-line string."""
    found = set(dir(builtins))
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case (
                ast.arg(arg=name) | ast.keyword(arg=str(name)) | ast.Name(id=name) | ast.Attribute(attr=name)
            ):
                found.add(name)
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                found |= {(each.asname or each.name).split(".")[-1] for each in names}
            case ast.Constant(value=str(text)) if "\n" not in text:
                found |= set(re.findall(r"\w+", text))
    return found


def quoted(tree: ast.Module) -> list[str]:
    """Returns the single names between double backticks in the file's docstrings."""
    places = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, places)]
    return [name for text in texts for name in re.findall(r"``([A-Za-z_]\w*)``", text)]


TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
# classes, functions and constants, which a docstring of any file may quote
PUBLIC = {
    node.name
    for tree in TREES.values()
    for node in ast.walk(tree)
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
} | {name for tree in TREES.values() for name in defined(tree) if name.isupper()}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_docstring_quotes_names_that_exist(path: Path):
    """A quoted field or parameter is in the same file. A quoted class or function may be in another file."""
    found = {*quoted(TREES[path])}
    unknown = sorted(found - defined(TREES[path]) - PUBLIC - PLACES - FOREIGN)
    assert not unknown
