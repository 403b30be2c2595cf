"""Measures the part start: seconds from the start of ``jmoe serve`` to its first answer to /health.

A plain checkpoint is served as it is and quantised while it loads, in turn, in opposite order every other
round. The first round fills the cache of compiled programs and is not counted.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from shared.origin import machine
from shared.random_checkpoint import checkpoint
from shared.results import smallest
from shared.server_process import free_port, serving

SERVED = {
    "bfloat16": [],
    "int8": ["--quantization", "int8"],
    "int4": ["--quantization", "int4"],
    "fp8": ["--quantization", "fp8"],
}

FEW = ["--max-num-seqs", "1", "--max-num-batched-tokens", "16"]  # few shapes to compile
SMALLEST = {
    "rounds": 1,
    "warm_ups": 0,
    "served_forms": {"bfloat16": FEW, "int8": ["--quantization", "int8", *FEW]},
}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the part of the results."""
    args = smallest(argparse.Namespace(**vars(args), served_forms=SERVED, warm_ups=1), SMALLEST)
    os.environ["JAX_PLATFORMS"] = "cpu"
    taken: dict[str, list[float]] = {name: [] for name in args.served_forms}
    with checkpoint(str(args.sizes)) as directory, tempfile.TemporaryDirectory() as logs:
        size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        for turn in range(-args.warm_ups, args.rounds):
            for name in list(taken)[:: 1 if turn % 2 == 0 else -1]:
                seconds = start_seconds(directory, args.served_forms[name], Path(logs) / "serve.log")
                print(f"round {turn + 1}, {name}: {seconds:.2f} s", flush=True)
                if turn >= 0:
                    taken[name].append(seconds)
    return {
        **machine(("jax",)),
        "model": args.sizes.stem,
        "threads": args.threads,
        "rounds": args.rounds,
        "checkpoint_bytes": size,
        "seconds": taken,
        "medians": {name: statistics.median(times) for name, times in taken.items()},
    }


def start_seconds(directory: Path, words: list[str], log: Path) -> float:
    """Starts a server and ends it; returns the seconds until it answered."""
    port = free_port()
    command = [sys.executable, "-m", "jmoe.cli", "serve", str(directory), "--port", str(port), *words]
    began = time.perf_counter()
    with serving(command, port, log, model=str(directory), extra={}):
        return time.perf_counter() - began
