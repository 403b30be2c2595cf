"""Measures the part transformers: ``transformers serve`` with continuous batching against jmoe's server."""

import argparse
from pathlib import Path
from typing import Any

from studies.serving.peers import Load, Peer
from studies.serving.turns import compare

PAGE = 256  # tokens in a page of transformers' cache


def words(model: Path, port: int, load: Load) -> list[str]:
    """Returns the words that start transformers' server.

    Its cache gets room for twice what the load needs. By default it takes most of the memory.
    """
    pages = -(-(4 * load.input_len + load.output_len) // PAGE) * load.concurrency * 2
    command = ["serve", str(model), "--continuous-batching", "--device", "cpu", "--host", "127.0.0.1"]
    return [*command, "--port", str(port), "--dtype", load.dtype, "--cb-num-blocks", str(pages)]


PEER = Peer(
    "transformers",
    "pip install 'transformers[serving]'",
    words,
    prompt_form="text",
    packages=("torch", "transformers"),
    extra={"ignore_eos": None},
)


def measure(args: argparse.Namespace) -> dict[str, Any] | None:
    return compare("transformers", PEER, args)
