"""Records how a stored figure was made: the command, the day, the machine, the versions."""

import argparse
import datetime
import importlib.metadata
import os
import subprocess
from pathlib import Path
from typing import Any


def command_line(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """Returns the command that measures the figure again.

    It has the options that are not at their defaults, but not the places of files on this machine.
    """
    words = [f"python scripts/{parser.prog}"]
    for action in parser._actions:
        value = getattr(args, action.dest, action.default)
        if value == action.default or action.dest in ("out", "peer_command"):
            continue
        values = value if isinstance(value, list) else [value]
        shown = [v.name if isinstance(v, Path) else str(v) for v in values]
        words += [action.option_strings[0], *(repr(v) if " " in v else v for v in shown)]
    return " ".join(words)


def machine(packages: tuple[str, ...], python: Path | None = None) -> dict[str, Any]:
    """Returns the date, the processor, the cores and the packages' versions.

    packages: packages whose versions are returned.
    python: interpreter whose versions are returned, except those of jmoe and jax; without it, all
        versions are those of this one.
    """
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return {
        "date": datetime.date.today().isoformat(),
        "processor": names[0] if names else "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: _version(name, python) for name in ("jmoe", *packages)},
    }


def _version(name: str, python: Path | None) -> str:
    ask = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    if python is not None and python.exists() and name not in ("jmoe", "jax"):  # the peer's may be elsewhere
        return subprocess.run([python, "-c", ask, name], capture_output=True, text=True).stdout.strip()
    if name == "jmoe":
        from jmoe import __version__

        return __version__
    return importlib.metadata.version(name)
