"""The kernels through the TPU's compiler, as ``scripts/tpu_kernel_report.py`` reports them."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def run_report(*arguments: str, timeout: float) -> list[dict]:
    """Returns what ``scripts/tpu_kernel_report.py --json`` prints.

    Raises RuntimeError with the script's output if it fails.
    """
    command = [sys.executable, str(ROOT / "scripts/tpu_kernel_report.py"), "--json", *arguments]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env={**os.environ, "PYTHONPATH": path}
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with {done.returncode}:\n{done.stderr[-4000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]
