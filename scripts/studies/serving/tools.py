"""Measures what tools cost an answer that is plain text: the same prompts with ``tools`` and without.

A grammar that may call holds the whole answer, but free text needs no mask and no wait for the host. The copy
of the model ends no turn at a line's end, and its template shows the tools to every conversation. So both
kinds of requests have the same prompts and lengths. Rounds alternate, in opposite order every other one.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from shared.origin import machine
from shared.results import few, smallest
from shared.server_process import Served, free_port, serving

from jmoe.engine.deployment.settings import model_directory
from jmoe.tools.bench.serve import ServeOptions, bench_serve

CONCURRENCY = (8, 32)
TEXT = "valid/dialogue_tools.txt.xz"
FUNCTION = {
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
TOOLS = [{"type": "function", "function": FUNCTION}]
BODIES: dict[str, dict[str, Any]] = {"text": {}, "tools": {"tools": TOOLS}}
SMALLEST = {"rounds": 1, "output_len": 2}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the ``tools`` part of the results."""
    args = smallest(args, SMALLEST)
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as temporary:
        folder, port = Path(temporary) / "model", free_port()
        folder.mkdir()
        copy_with_tools(model_directory("tiny"), folder)
        words = [sys.executable, "-m", "jmoe.cli", "serve", str(folder), "--port", str(port)]
        words += ["--tool-format", "functools", "--max-num-seqs", str(max(CONCURRENCY))]
        log = Path(temporary) / "jmoe.log"
        with serving(words, port, log, model=str(folder), extra={}) as served:
            rows = {str(count): row(args, served, count) for count in CONCURRENCY[few(args.dry)]}
    return {**machine(("jax",)), "rounds": args.rounds, "output_len": args.output_len, "rows": rows}


def copy_with_tools(directory: Path, folder: Path) -> None:
    """Copies the model without the texts that end a turn. Its template shows the tools to a conversation that
    has none."""
    for path in directory.iterdir():
        if path.name != "generation_config.json":
            shutil.copy(path, folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = f"{{% set tools = tools or {json.dumps(TOOLS)} %}}{config['chat_template']}"
    path.write_text(json.dumps(config))


def row(args: argparse.Namespace, served: Served, concurrency: int) -> dict[str, Any]:
    """Returns the milliseconds per token of each round, by kind of request."""
    times: dict[str, list[float]] = {kind: [] for kind in BODIES}
    for number in range(-1, args.rounds):  # the first round warms up
        for kind in list(BODIES) if number % 2 else list(BODIES)[::-1]:
            report = bench_serve(
                ServeOptions(
                    base_url=served.url,
                    endpoint="chat",
                    data=(args.data / TEXT,),
                    input_len=64,
                    output_len=args.output_len,
                    num_prompts=2 * concurrency,
                    max_concurrency=concurrency,
                    seed=number + 1,
                    temperature=0.7,
                    extra_body=BODIES[kind],
                )
            )
            if report["failed"]:
                raise SystemExit(f"{report['failed']} requests with {kind} failed: {report['failures']}")
            if number >= 0:
                times[kind].append(report["mean_tpot_ms"])
    print(f"{concurrency} at a time: {times}", flush=True)
    return times
