"""Compares ``jmoe serve`` with another server on the same CPU: one checkpoint, one load.

Both servers have a copy of the checkpoint without end-of-text tokens (``transformers serve`` has no
``ignore_eos``), greedily, in the same dtype, and as many places as the largest concurrency; ``jmoe bench
serve`` sends the same prompts to both. Rounds alternate, in opposite order every other one; while one server
is measured the other's processes are stopped. Each round has prompts of its own, so that no cache of prefixes
knows them. Token counts must be equal on both sides. Ratios are the median of the rounds' ratios and their
range. ``--prefill-len`` adds one request at a time with a prompt of so many words and two tokens of answer.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from shared.origin import machine
from shared.results import smallest
from shared.server_process import Served, free_port, serving
from studies.serving.peers import Load, Peer

from jmoe.engine.deployment.settings import model_directory
from jmoe.tools.bench.serve import ServeOptions, bench_serve

KEPT = (
    "duration", "output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms",
    "median_e2el_ms", "client_cpu_share",
)  # fmt: skip


SMALLEST = {"concurrency": [1], "requests": 2, "rounds": 1, "input_len": 4, "output_len": 2}


def compare(name: str, peer: Peer, args: argparse.Namespace) -> dict[str, Any] | None:
    """Returns the figures of jmoe and of the peer ``name``, or None if the peer is not installed."""
    args = smallest(args, SMALLEST)
    if (command := program(args.peer_command or peer.command)) is None:
        print(f"{name}: skipped, there is no command {peer.command}: {peer.install}, or --peer-command PATH")
        return None
    os.environ["JAX_PLATFORMS"] = "cpu"  # as the other
    with tempfile.TemporaryDirectory() as temporary:
        folder, logs = Path(temporary) / "model", Path(temporary)
        folder.mkdir()
        copy_without_ends(model_directory(args.model), folder)
        ports = free_port(), free_port()
        longest = max(args.input_len, args.prefill_len or 0)
        load = Load(max(args.concurrency), longest, args.output_len, args.dtype)
        ours = jmoe_words(args, folder, ports[0])
        theirs = [command, *peer.words(folder, ports[1], load), *shlex.split(args.peer_options)]
        alike: dict[str, Any] = {"model": str(folder), "prompt_form": peer.prompt_form}
        with (
            serving(ours, ports[0], logs / "jmoe.log", extra={}, **alike) as mine,
            serving(
                theirs, ports[1], logs / "peer.log", extra=peer.extra, environment=peer.environment, **alike
            ) as other,
        ):
            servers = {"jmoe": mine, name: other}
            for served in servers.values():
                served.signal(signal.SIGSTOP)
            rows = {str(count): take_turns(servers, args, count) for count in args.concurrency}
            prefill = {} if args.prefill_len is None else take_turns(servers, prefill_options(args), 1)
    return {
        **machine(("jax", *peer.packages), python=Path(command).resolve().parent / "python"),
        "model": args.model,
        "dtype": args.dtype,
        "settings": {key: getattr(args, key) for key in ("requests", "input_len", "output_len", "rounds")},
        "flags": {"jmoe": args.jmoe_options, name: " ".join(peer.shown(theirs[1:]))},
        "rows": rows,
        **({"prefill": {"input_len": args.prefill_len, **prefill}} if prefill else {}),
    }


# ---- the two servers


def program(name: str) -> str | None:
    """Returns the path of a program, also of this environment if it is not activated, or None."""
    return shutil.which(name) or shutil.which(name, path=Path(sys.executable).parent)


def copy_without_ends(directory: Path, folder: Path) -> None:
    """Copies the checkpoint to ``folder`` without a token that ends a text. Its weights are links."""
    for path in directory.iterdir():
        if path.name not in ("config.json", "generation_config.json"):
            (folder / path.name).symlink_to(path.resolve())
    config = json.loads((directory / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    if not (folder / "tokenizer.json").exists():
        raise SystemExit(f"{directory} has no tokenizer.json; the peers need one")


def jmoe_words(args: argparse.Namespace, directory: Path, port: int) -> list[str]:
    words = [sys.executable, "-m", "jmoe.cli", "serve", str(directory), "--port", str(port)]
    words += ["--max-num-seqs", str(max(args.concurrency)), "--dtype", args.dtype]
    return words + shlex.split(args.jmoe_options)


# ---- turns


def prefill_options(args: argparse.Namespace) -> argparse.Namespace:
    """Returns the options of the row that prefills: long prompts, the shortest answers that have a rest."""
    lengths = {"input_len": args.prefill_len, "output_len": 2, "requests": args.requests or 4}
    return argparse.Namespace(**vars(args) | lengths)


def measured(
    served: Served, args: argparse.Namespace, seed: int, concurrency: int, requests: int, output_len: int
) -> dict:
    """Returns the report of one round. Raises SystemExit if a request failed."""
    report = bench_serve(
        ServeOptions(
            base_url=served.url,
            served_model=served.model,
            input_len=args.input_len,
            output_len=output_len,
            num_prompts=requests,
            max_concurrency=concurrency,
            prompt_form=served.prompt_form,
            data=tuple(args.prompt_text),
            extra_body=served.extra,
            seed=seed,
        )
    )
    if report["failed"]:
        raise SystemExit(f"{served.url}: {report['failures']}")
    return report


def take_turns(servers: dict[str, Served], args: argparse.Namespace, concurrency: int) -> dict[str, dict]:
    """Returns the samples of every figure by server. Raises SystemExit if their token counts differ.

    The servers are stopped before and after this.
    """
    requests = args.requests or 4 * concurrency
    samples: dict[str, dict[str, list[Any]]] = {name: {key: [] for key in KEPT} for name in servers}
    for turn in range(-1, args.rounds):  # the first round warms up
        counts = {}
        for name in list(servers)[:: 1 if turn % 2 == 0 else -1]:
            servers[name].signal(signal.SIGCONT)
            seed = 1000 * concurrency + turn
            of_round = (requests, args.output_len) if turn >= 0 else (concurrency, min(args.output_len, 8))
            report = measured(servers[name], args, seed, concurrency, *of_round)
            servers[name].signal(signal.SIGSTOP)
            counts[name] = [report["total_input_tokens"], report["total_output_tokens"]]
            if turn >= 0:
                for key in KEPT:
                    samples[name][key].append(report[key])
                speed, first = report["output_throughput"], report["median_ttft_ms"]
                which = f"{concurrency} at a time, round {turn + 1}, {name}"
                print(f"{which}: {speed:.1f} output tokens/s, TTFT {first:.1f} ms", flush=True)
        if len({tuple(count) for count in counts.values()}) > 1:
            raise SystemExit(f"the servers do not count the same tokens: {counts}")
        if turn >= 0:
            for name in servers:
                samples[name].setdefault("tokens", []).append(counts[name])
    return samples
