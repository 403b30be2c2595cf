"""What the benchmarks of the techniques share: figures as JSON, tables of a document, the frame of its plots.

A benchmark has parts. A part's figures replace its last ones in the JSON; the document and the plots are made
from the JSON alone.
"""

import argparse
import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

STYLE = {"svg.fonttype": "none", "svg.hashsalt": "jmoe", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}


def dumps(results: dict[str, Any], depth: int = 4) -> str:
    """JSON with a line for each value below ``depth`` levels."""

    def lines(value: Any, level: int) -> str:
        if not isinstance(value, dict) or level == depth or not value:
            return json.dumps(value)
        pad = " " * (level + 1)
        body = ",\n".join(f"{pad}{json.dumps(k)}: {lines(v, level + 1)}" for k, v in value.items())
        return f"{{\n{body}\n{pad[1:]}}}"

    return lines(results, 0) + "\n"


def command(parser: argparse.ArgumentParser, args: argparse.Namespace, part: str) -> str:
    """What measures the part so again: those of its own options that are not at their defaults.

    An option is a part's where its help begins with the part's name, or several of them, and a colon.
    """
    words = [f"python scripts/{parser.prog} --data ../shared/data --parts", part]
    for action in parser._actions:
        value = getattr(args, action.dest, action.default)
        parts, _, _ = (action.help or "").partition(":")
        if part not in parts.split(", ") or value == action.default:
            continue
        values = value if isinstance(value, list) else [value]
        words.append(
            f"--{action.dest}" if value is True else " ".join([f"--{action.dest}", *map(str, values)])
        )
    return " ".join(words)


def run_each(script: str, parts: Iterable[str], known: Iterable[str]) -> None:
    """Runs ``script`` with this process's options once a part, each in a process of its own: one wants
    several devices, another one."""
    options = [a for a in sys.argv[1:] if a not in ("--parts", *known)]
    for part in parts:
        subprocess.run([sys.executable, script, *options, "--parts", part], check=True)


def few(dry: bool) -> slice:
    """What a part takes of a list of settings: all of them, or the first alone, to try its flow."""
    return slice(0, 1) if dry else slice(None)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)] + [""]


def signed(value: float, error: float, digits: int = 4) -> str:
    return f"{value:+.{digits}f} ± {error:.{digits}f}"


def verdict(value: float, error: float) -> str:
    """Whether ``value`` is above 0, at two standard errors: yes, no (below) or even."""
    return "yes" if value > 2 * error else "no" if value < -2 * error else "even"


def draw_plots(plots: dict[str, Callable[[Any], Any]], folder: Path) -> None:
    """Writes ``<name>.svg`` of every plot, a function from pyplot to a figure."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is absent (pip install 'jmoe[plots]')")
        return
    matplotlib, pyplot = map(importlib.import_module, ("matplotlib", "matplotlib.pyplot"))
    pyplot.switch_backend("svg")
    with matplotlib.rc_context(STYLE):
        for name, plot in plots.items():
            figure = plot(pyplot)
            figure.tight_layout()
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            pyplot.close(figure)
