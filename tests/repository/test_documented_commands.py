"""Tests that each command of the documents runs, in a small form: a figure needs a command that works."""

import gzip
import importlib.util
import json
import lzma
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.documented_commands import COMMANDS, SIZES, Command
from support.models import hf_tiny
from support.ports import own_port

from jmoe.cli.main import parser

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SCRIPT = re.compile(r"(?<!/)\b(scripts/(?:make/|acceptance/)?\w+\.(?:py|sh))\b")
CASES = [
    pytest.param(
        name,
        command,
        id=f"{name.removeprefix('scripts/')}-{i}",
        marks=pytest.mark.commands,
    )
    for name, commands in COMMANDS.items()
    for i, command in enumerate(commands)
    if command.words
]


def test_every_documented_command_is_in_the_table():
    named = {name for path in DOCUMENTS for name in SCRIPT.findall(path.read_text(encoding="utf-8"))}
    commands = next(iter(parser()._subparsers._group_actions)).choices  # type: ignore[union-attr]
    assert (named | {f"jmoe {name}" for name in commands}) - set(COMMANDS) == set()


def test_what_the_table_names_is_there():
    for name, commands in COMMANDS.items():
        assert name.startswith("jmoe ") or (ROOT / name).is_file(), name
        for command in commands:
            files = re.findall(r"tests/[\w/]+\.py", command.elsewhere)
            assert all((ROOT / file).is_file() for file in files) and bool(command.words) != bool(
                command.elsewhere
            )


@pytest.fixture(scope="module")
def things(tmp_path_factory) -> dict[str, str]:
    """Returns the values of the words in braces, except those that belong to one command."""
    folder = tmp_path_factory.mktemp("things")
    text, sizes, trace = (folder / name for name in ("text.txt", "sizes.toml", "trace.jsonl.gz"))
    hf, study, corpus = (folder / name for name in ("hf", "study", "corpus"))
    text.write_text(
        "<|endoftext|>\n".join("A small text that ends soon, and another one.\n" * 3 for _ in range(40))
    )
    sizes.write_text(SIZES)
    rows = [{"timestamp": i, "input_length": 4, "output_length": 2} for i in range(2)]
    with gzip.open(trace, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    config = hf_tiny.hf_config(vocab_size=256, eos_token_id=None)
    hf_tiny.write_checkpoint(hf, config)
    hf_tiny.write_tokenizer(hf)
    larger = {"max_position_embeddings": 512, "num_local_experts": 32, "num_experts_per_tok": 4}
    hf_tiny.write_checkpoint(study, config | larger | {"num_hidden_layers": 4})
    hf_tiny.write_tokenizer(study)
    (corpus / "valid").mkdir(parents=True)
    for domain in ("letters", "numbers"):
        with lzma.open(corpus / "valid" / f"{domain}.txt.xz", "wt") as file:
            file.write(text.read_text())
    found = {
        "text": text,
        "sizes": sizes,
        "trace": trace,
        "hf": hf,
        "study": study,
        "corpus": corpus,
        "data": DATA,
        "profile": folder / "p.npz",
    }
    return {name: str(path) for name, path in found.items()}


@pytest.fixture(scope="module")
def url(things) -> Iterator[str]:
    port = own_port()
    log = Path(things["text"]).with_name("serve.log")
    with open(log, "w") as file:
        words = [
            sys.executable,
            "-m",
            "jmoe.cli",
            "serve",
            "tiny",
            "--port",
            str(port),
            "--max-num-seqs",
            "2",
        ]
        server = subprocess.Popen([*words, "--max-num-batched-tokens", "64"], stdout=file, stderr=file)
    end = time.monotonic() + 500
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=2).close()
            break
        except OSError:
            time.sleep(0.2)
    else:
        raise AssertionError(log.read_text()[-2000:])
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.wait(120)


def run(words: list[str], devices: int) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


@pytest.mark.parametrize(("name", "command"), CASES)
def test_a_documented_command_runs(name: str, command: Command, things, tmp_path, request):
    missing = [module for module in command.needs if importlib.util.find_spec(module) is None]
    if missing:
        pytest.skip(f"{name} needs {', '.join(missing)}")
    if "{data}" in command.words and not DATA.is_dir():
        pytest.skip(f"{name} needs the project's data")
    known = things | {"tmp": str(tmp_path)}
    if "{url}" in command.words:
        known["url"] = request.getfixturevalue("url")
    if "{profile}" in command.words and not Path(things["profile"]).exists():
        making = f"profile {things['hf']} --data {things['text']} --out {things['profile']} --max-tokens 512"
        assert run([sys.executable, "-m", "jmoe.cli", *shlex.split(making)], 1).returncode == 0
    words = [word.format(**known) for word in shlex.split(command.words)]
    program = [sys.executable] if words[0].startswith("scripts/") else [sys.executable, "-m", "jmoe.cli"]
    done = run([*program, *words], command.devices)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr
