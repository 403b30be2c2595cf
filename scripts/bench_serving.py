"""Compares ``jmoe serve`` with another server on the same CPU: one checkpoint, one load.

    python scripts/bench_serving.py --model tiny --concurrency 32 --rounds 5
    python scripts/bench_serving.py --peer vllm --peer-command VENV/bin/vllm --concurrency 1 8 32

The peers are ``transformers serve`` with continuous batching and ``vllm serve`` (``shared.serving_peers``
says how to install and start each). Both servers have a copy of the checkpoint without end-of-text tokens
(``transformers serve`` has no ``ignore_eos``), greedily, in the same dtype, and as many places as the largest
``--concurrency``; ``jmoe bench serve`` sends the same prompts to both, ``--concurrency`` at a time. Rounds
alternate, in opposite order every other one; while one server is measured the other's processes are stopped.
Each round has prompts of its own, so that no cache of prefixes knows them. Token counts must be equal on both
sides. Ratios are the median of the rounds' ratios and their range.

Writes the peer's part of docs/results/serving.json and docs/results/serving.md, which is made from it. Run it
on an otherwise idle machine.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from shared.origin import command_line, machine
from shared.serving_peers import PEERS, Load, Peer
from shared.serving_report import write_part

from jmoe.engine.build import model_directory
from jmoe.tools.bench.serve import ServeOptions, bench_serve

KEPT = (
    "duration", "output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms",
    "median_e2el_ms", "client_cpu_share",
)  # fmt: skip


def arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="tiny, or a Hugging Face directory")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--peer", choices=tuple(PEERS), default="transformers")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[32], help="a row of the table each")
    parser.add_argument("--requests", type=int, help="a round; by default 4 times the row's concurrency")
    parser.add_argument("--input-len", type=int, default=64, help="words of a prompt")
    parser.add_argument("--output-len", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="text that prompts are cut from")
    parser.add_argument("--jmoe-options", default="", help="further flags of jmoe serve, in one word")
    parser.add_argument("--peer-options", default="", help="further flags of the peer, in one word")
    parser.add_argument("--peer-command", help="the peer's program, where it is not on the path")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of the results")
    args = parser.parse_args()
    if min(*args.concurrency, args.requests or 1, args.input_len, args.rounds) < 1 or args.output_len < 2:
        parser.error("sizes must be at least 1, and --output-len at least 2")
    return parser, args


# ---- servers


@dataclass
class Served:
    """A running server.

    process: the leader of the server's process group.
    url: its URL.
    model: the model's name in a request.
    extra: more fields of a request's body.
    prompt_form: the form of a prompt that it takes.
    """

    process: subprocess.Popen
    url: str
    model: str
    extra: dict[str, Any]
    prompt_form: Literal["ids", "text"]

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)


def copy_without_ends(directory: Path, folder: Path) -> None:
    """Copies the checkpoint to ``folder`` without a token that ends a text. Its weights are links."""
    for path in directory.iterdir():
        if path.name not in ("config.json", "generation_config.json"):
            (folder / path.name).symlink_to(path.resolve())
    config = json.loads((directory / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    if not (folder / "tokenizer.json").exists():
        raise SystemExit(f"{directory} has no tokenizer.json; the peers need one")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(
    words: list[str],
    port: int,
    log: Path,
    *,
    model: str,
    extra: dict[str, Any],
    prompt_form: Literal["ids", "text"] = "text",
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Served]:
    """Yields the server once it answers /health. Otherwise raises SystemExit with the end of its log."""
    url = f"http://127.0.0.1:{port}"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server ends with this process
    with log.open("wb") as file:
        process = subprocess.Popen(
            words,
            stdout=file,
            stderr=file,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
            start_new_session=True,
        )
    served = Served(process, url, model, extra, prompt_form)
    try:
        wait_for(served, log)
        yield served
    finally:
        with contextlib.suppress(ProcessLookupError):
            served.signal(signal.SIGCONT)
            served.signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            served.signal(signal.SIGKILL)


def wait_for(served: Served, log: Path, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and served.process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{served.url}/health", timeout=2):
            return
        time.sleep(0.3)
    raise SystemExit(f"{served.url} does not serve: {log.read_text(errors='replace')[-1000:]}")


def jmoe_words(args: argparse.Namespace, directory: Path, port: int) -> list[str]:
    words = [sys.executable, "-m", "jmoe.cli", "serve", str(directory), "--port", str(port)]
    words += ["--max-num-seqs", str(max(args.concurrency)), "--dtype", args.dtype]
    return words + shlex.split(args.jmoe_options)


# ---- measuring


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
            data=tuple(args.data),
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


def main() -> None:
    parser, args = arguments()
    peer: Peer = PEERS[args.peer]
    wanted = args.peer_command or peer.command
    folder = Path(sys.executable).parent  # the programs of this environment, even if it is not activated
    command = shutil.which(wanted) or shutil.which(wanted, path=folder)
    if command is None:
        raise SystemExit(f"no command {wanted}: {peer.install}, or --peer-command PATH")
    os.environ["JAX_PLATFORMS"] = "cpu"  # as the other
    with tempfile.TemporaryDirectory() as temporary:
        folder, logs = Path(temporary) / "model", Path(temporary)
        folder.mkdir()
        copy_without_ends(model_directory(args.model), folder)
        ports = free_port(), free_port()
        load = Load(max(args.concurrency), args.input_len, args.output_len, args.dtype)
        ours = jmoe_words(args, folder, ports[0])
        theirs = [command, *peer.words(folder, ports[1], load), *shlex.split(args.peer_options)]
        alike: dict[str, Any] = {"model": str(folder), "prompt_form": peer.prompt_form}
        with (
            serving(ours, ports[0], logs / "jmoe.log", extra={}, **alike) as mine,
            serving(
                theirs, ports[1], logs / "peer.log", extra=peer.extra, environment=peer.environment, **alike
            ) as other,
        ):
            servers = {"jmoe": mine, args.peer: other}
            for served in servers.values():
                served.signal(signal.SIGSTOP)
            rows = {str(count): take_turns(servers, args, count) for count in args.concurrency}
    settings = {k: getattr(args, k) for k in ("requests", "input_len", "output_len", "rounds")}
    program = shutil.which(command)
    write_part(
        args.out,
        args.peer,
        {
            "command": command_line(parser, args),
            **machine(("jax", *peer.packages), python=Path(str(program)).resolve().parent / "python"),
            "model": args.model,
            "dtype": args.dtype,
            "settings": settings,
            "flags": {"jmoe": args.jmoe_options, args.peer: " ".join(peer.shown(theirs[1:]))},
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
