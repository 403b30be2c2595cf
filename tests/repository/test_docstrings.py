"""Tests that docstrings quote names that exist, and begin with a sentence or a noun phrase."""

import ast
import builtins
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [path for part in ("jmoe", "kernels", "scripts") for path in sorted((ROOT / part).rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
FOREIGN = {  # functions of libraries; settings; their values; ends of names
    "with", "shard_map", "device_put", "as_text", "memory_analysis", "broadcast_one_to_all", "llama_decode",
    "prompt_logprobs", "max_tokens", "ignore_eos", "tool_choice", "kv_memory", "max_num_seqs",
    "affinity", "popularity", "oea", "data", "lfu", "tp", "tensor", "traffic", "remote_assignments",
    "_s", "_hbm",
}  # fmt: skip
FOREIGN_OWNERS = {"client", "dataclasses", "lm_head", "pl", "plgpu", "time", "vmatpush"}  # of dotted names
QUESTION = re.compile(r"(What|Which|How|Where|Who|When)\b")
SHOWN = {  # docstrings that users see: in the OpenAPI document, as the help of a study
    "What lossy techniques did to the answers' assignments of tokens to experts.",
    "How much a greedy answer depends on the requests that are computed in the same steps.",
}
DATA_FILES = {"jinja", "json", "log", "md", "npz", "safetensors"}  # ends of names that are files of data
Scope = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


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


def docstrings(tree: ast.Module) -> list[str]:
    return [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, Scope)]


def quoted(tree: ast.Module, pattern: str) -> set[str]:
    """Returns what matches the pattern between double backquotes in the file's docstrings."""
    return {name for text in docstrings(tree) for name in re.findall(rf"``({pattern})(?:\(\))?``", text)}


TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in [*SOURCES, *TESTS]}
CLASSES: dict[str, list[ast.ClassDef]] = {}
for tree in TREES.values():
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            CLASSES.setdefault(node.name, []).append(node)


def public(paths: Iterable[Path]) -> set[str]:
    """Returns the classes, functions and constants of the files."""
    trees = [TREES[path] for path in paths]
    constants = {name for tree in trees for name in defined(tree) if name.isupper()}
    places = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return constants | {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, places)}


PUBLIC = {  # by the first folder of the file that quotes them: only a script may name what is in a script
    "scripts": public(SOURCES),
    "jmoe": (library := public(path for path in SOURCES if not path.is_relative_to(ROOT / "scripts"))),
    "kernels": library,
}


def members(scope: ast.Module | ast.ClassDef) -> set[str]:
    """Returns the names of a module's top level, or the fields and methods of a class and of its bases."""
    found: set[str] = set()
    for node in scope.body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                found |= {(each.asname or each.name).split(".")[0] for each in names}
            case ast.Assign(targets=targets):
                found |= {
                    part.id for each in targets for part in ast.walk(each) if isinstance(part, ast.Name)
                }
            case ast.AnnAssign(target=ast.Name(id=name)):
                found.add(name)
    if isinstance(scope, ast.ClassDef):
        for node in ast.walk(scope):
            match node:
                case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                    found.add(name)
        for base in scope.bases:
            found |= members_of_class(ast.unparse(base).split("[")[0].split(".")[-1])
    return found


def members_of_class(name: str) -> set[str]:
    return {member for each in CLASSES.get(name, ()) for member in members(each)}


def is_module(place: Path) -> bool:
    return place.is_dir() or place.with_suffix(".py").is_file()


def modules_near(name: str, path: Path) -> list[Path]:
    """Returns the modules of that name next to the file, next to a folder above it, or in kernels/."""
    above = [folder for folder in path.parents if folder.is_relative_to(ROOT)]
    return [folder / name for folder in [*above, ROOT / "kernels"] if is_module(folder / name)]


def is_in(place: Path, names: list[str]) -> bool:
    """Returns whether the module at ``place`` has the first name, the first name the second, and so on."""
    if not names:
        return True
    if is_module(place / names[0]):
        return is_in(place / names[0], names[1:])
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    if file not in TREES or names[0] not in members(TREES[file]):
        return False
    return len(names) == 1 or names[0] not in CLASSES or names[1] in members_of_class(names[0])


def exists(name: str, path: Path) -> bool:
    """Returns whether a dotted name exists that a docstring of ``path`` quotes.

    It begins with a module near the file, with a class of the project, or with a name of the file, such as a
    parameter. The attributes of other libraries are not checked.
    """
    first, *rest = name.split(".")
    if rest[-1] in DATA_FILES:
        return True
    if rest == ["py"]:
        return any(other.name == name for other in TREES)
    places = modules_near(first, path)
    if any(is_in(place, rest) for place in places):
        return True
    if first in CLASSES:
        return rest[0] in members_of_class(first)
    names = defined(TREES[path])
    return first in FOREIGN_OWNERS or (first in names and (not places or rest[0] in names))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_docstring_quotes_names_that_exist(path: Path):
    """A quoted field or parameter is in the same file. A quoted class or function may be in another file."""
    found = quoted(TREES[path], r"[A-Za-z_]\w*")
    unknown = found - defined(TREES[path]) - PUBLIC[path.relative_to(ROOT).parts[0]] - FOREIGN
    assert not [name for name in sorted(unknown) if not modules_near(name, path)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_docstring_does_not_begin_as_a_question(path: Path):
    """A clause such as "What a step takes" is no sentence; "The inputs of a step" names the thing."""
    texts = docstrings(TREES[path])
    assert not [text for text in texts if QUESTION.match(text) and text not in SHOWN]


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_a_docstring_quotes_dotted_names_that_exist(path: Path):
    unknown = [
        name for name in sorted(quoted(TREES[path], r"[A-Za-z_]\w*(?:\.\w+)+")) if not exists(name, path)
    ]
    assert not unknown
