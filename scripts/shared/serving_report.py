"""Writes docs/results/serving.json, one part at a time, and the page that is made only from it."""

import json
from pathlib import Path
from typing import Any

from shared import serving_tables
from shared.document import render
from shared.results import dumps


def write_part(folder: Path, part: str, figures: dict[str, Any]) -> None:
    """Replaces the part in ``serving.json`` and writes ``serving.md`` again."""
    path = folder / "serving.json"
    folder.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {}
    results[part] = figures
    path.write_text(dumps(results))
    (folder / "serving.md").write_text(page(results))
    print(f"wrote {path} and {folder / 'serving.md'}")


def page(results: dict[str, Any]) -> str:
    """Returns the page of transformers, vllm, traces and host. A part without results is left out."""
    text = render(Path(__file__).with_name("serving.md"), {"tables": serving_tables, **results})
    return text.rstrip() + "\n"
