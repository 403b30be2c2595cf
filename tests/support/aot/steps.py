"""The engine's steps through the TPU's compiler, as ``scripts/tpu_aot_check.py`` reports them."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
QWEN = ROOT / "configs/model/qwen3-30b-a3b.toml"


def check(*arguments: str) -> tuple[int, list[dict]]:
    """Returns the exit status and the rows of the script."""
    command = [sys.executable, str(ROOT / "scripts/tpu_aot_check.py"), "--json", *arguments]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=path))
    assert done.returncode in (0, 1) and done.stdout, done.stderr[-3000:]
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]
