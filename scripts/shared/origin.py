"""Records where a stored figure was made: the day, the machine, the versions."""

import datetime
import importlib.metadata
import os
import subprocess
from pathlib import Path
from typing import Any


def machine(packages: tuple[str, ...], python: Path | None = None) -> dict[str, Any]:
    """Returns the date, the processor, the cores and the packages' versions.

    packages: packages whose versions are returned.
    python: interpreter whose versions are returned, except those of jmoe and jax, or "absent"; without it,
        all versions are those of this one.
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
    program = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    if python is not None and python.exists() and name not in ("jmoe", "jax"):  # the peer's may be elsewhere
        found = subprocess.run([python, "-c", program, name], capture_output=True, text=True)
        return found.stdout.strip() or "absent"
    if name == "jmoe":
        from jmoe import __version__

        return __version__
    return importlib.metadata.version(name)
