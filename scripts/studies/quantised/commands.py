"""Runs other commands of ``scripts`` that measure, on the cores of this process, and returns their JSON."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parents[2]


def figures_of(script: str, *words: object) -> dict[str, Any]:
    """Returns what ``python scripts/SCRIPT WORDS --json FILE`` writes; raises SystemExit if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        run(script, *words, "--json", file)
        return json.loads(file.read_text(encoding="utf-8"))


def run(script: str, *words: object) -> None:
    """Runs a script of this folder to its end; raises SystemExit if it fails."""
    command = [sys.executable, str(SCRIPTS / script), *map(str, words)]
    if code := subprocess.run(command).returncode:
        raise SystemExit(f"{script} ended with {code}")
