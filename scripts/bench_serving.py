"""Measures ``jmoe serve`` beside ``transformers serve`` with continuous batching: one checkpoint, one load.

    python scripts/bench_serving.py --model tiny --concurrency 32 --rounds 5

Both serve a copy of the checkpoint without end-of-text tokens (``transformers serve`` has no ``ignore_eos``),
greedily, in the same dtype; ``jmoe bench serve`` sends the same text prompts to both, ``--concurrency`` at a
time. Rounds alternate, in opposite order every other one; while one server is measured the other's processes
are stopped. Each round has prompts of its own, so that no cache of prefixes knows them. Token counts must be
equal on both sides. Ratios are the median of the rounds' ratios and their range.

Writes the part "serving" of docs/results/serving.json and docs/results/serving.md, which is made from it.
Needs the parity extra and transformers[serving]; run it on an otherwise idle machine.
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving_report import command_line, machine, write_part

from jmoe.engine.build import model_directory
from jmoe.tools.bench.serve import ServeOptions, bench_serve

PAGE = 256  # tokens of a page of transformers' cache
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
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--requests", type=int, default=128, help="a round")
    parser.add_argument("--input-len", type=int, default=64, help="words of a prompt")
    parser.add_argument("--output-len", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="text that prompts are cut from")
    parser.add_argument("--jmoe-options", default="", help="further flags of jmoe serve, in one word")
    parser.add_argument("--peer-options", default="", help="further flags of transformers serve, in one word")
    parser.add_argument(
        "--transformers", default=str(Path(sys.prefix) / "bin/transformers"), help="its command"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of the results")
    args = parser.parse_args()
    if min(args.concurrency, args.requests, args.input_len, args.rounds) < 1 or args.output_len < 2:
        parser.error("sizes must be at least 1, and --output-len at least 2")
    return parser, args


# ---- servers


@dataclass
class Served:
    """A server's process group, its URL and what a load must say to it."""

    process: subprocess.Popen
    url: str
    model: str
    extra: dict[str, Any]

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)


def copy_without_ends(directory: Path, folder: Path) -> None:
    """The checkpoint under ``folder``, its weights linked, with no token that ends a text."""
    for path in directory.iterdir():
        if path.name not in ("config.json", "generation_config.json"):
            (folder / path.name).symlink_to(path.resolve())
    config = json.loads((directory / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    if not (folder / "tokenizer.json").exists():
        raise SystemExit(f"{directory} has no tokenizer.json, and transformers serve takes text only")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(words: list[str], port: int, log: Path, **about: Any) -> Iterator[Served]:
    """The server once it answers /health; raises SystemExit with the end of its log where it does not."""
    url = f"http://127.0.0.1:{port}"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server ends with this process
    with log.open("wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file, env=environment, start_new_session=True)
    served = Served(process, url, **about)
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
    words += ["--max-num-seqs", str(args.concurrency), "--dtype", args.dtype]
    return words + shlex.split(args.jmoe_options)


def peer_words(args: argparse.Namespace, directory: Path, port: int) -> list[str]:
    """Its cache is given room for twice what the load needs; by itself it takes most of the memory."""
    pages = -(-(4 * args.input_len + args.output_len) // PAGE) * args.concurrency * 2
    words = [args.transformers, "serve", str(directory), "--continuous-batching", "--device", "cpu"]
    words += ["--port", str(port), "--host", "127.0.0.1", "--dtype", args.dtype]
    return [*words, "--cb-num-blocks", str(pages), *shlex.split(args.peer_options)]


# ---- measuring


def measured(served: Served, args: argparse.Namespace, seed: int, requests: int, output_len: int) -> dict:
    """The report of one round; raises SystemExit where a request failed."""
    report = bench_serve(
        ServeOptions(
            base_url=served.url,
            served_model=served.model,
            input_len=args.input_len,
            output_len=output_len,
            num_prompts=requests,
            max_concurrency=args.concurrency,
            prompt_form="text",
            data=tuple(args.data),
            extra_body=served.extra,
            seed=seed,
        )
    )
    if report["failed"]:
        raise SystemExit(f"{served.url}: {report['failures']}")
    return report


def take_turns(ours: Served, theirs: Served, args: argparse.Namespace) -> dict[str, dict[str, list[Any]]]:
    """Every figure's samples by server; raises SystemExit where their token counts differ."""
    servers = {"jmoe": ours, "transformers": theirs}
    samples: dict[str, dict[str, list[Any]]] = {name: {key: [] for key in KEPT} for name in servers}
    for served in servers.values():
        measured(served, args, 10_000, args.concurrency, min(args.output_len, 8))  # warms up
        served.signal(signal.SIGSTOP)
    for turn in range(args.rounds):
        counts = {}
        for name in list(servers)[:: 1 if turn % 2 == 0 else -1]:
            servers[name].signal(signal.SIGCONT)
            report = measured(servers[name], args, turn, args.requests, args.output_len)
            servers[name].signal(signal.SIGSTOP)
            counts[name] = [report["total_input_tokens"], report["total_output_tokens"]]
            for key in KEPT:
                samples[name][key].append(report[key])
            print(f"round {turn + 1}, {name}: {report['output_throughput']:.1f} output tokens/s", flush=True)
        if counts["jmoe"] != counts["transformers"]:
            raise SystemExit(f"the servers do not count the same tokens: {counts}")
        for name in servers:
            samples[name].setdefault("tokens", []).append(counts[name])
    return samples


def main() -> None:
    parser, args = arguments()
    if shutil.which(args.transformers) is None:
        raise SystemExit(
            "no transformers command: pip install 'transformers[serving]', or --transformers PATH"
        )
    os.environ["JAX_PLATFORMS"] = "cpu"  # as the other
    with tempfile.TemporaryDirectory() as temporary:
        folder, logs = Path(temporary) / "model", Path(temporary)
        folder.mkdir()
        copy_without_ends(model_directory(args.model), folder)
        ports = free_port(), free_port()
        words = jmoe_words(args, folder, ports[0]), peer_words(args, folder, ports[1])
        mine = {"model": str(folder), "extra": {}}
        theirs = {"model": str(folder), "extra": {"ignore_eos": None}}
        with (
            serving(words[0], ports[0], logs / "jmoe.log", **mine) as ours,
            serving(words[1], ports[1], logs / "peer.log", **theirs) as peer,
        ):
            samples = take_turns(ours, peer, args)
    settings = {k: getattr(args, k) for k in ("concurrency", "requests", "input_len", "output_len", "rounds")}
    packages = ("jax", "torch", "transformers")
    write_part(
        args.out,
        "serving",
        {
            "command": command_line(parser, args),
            **machine(packages, python=Path(args.transformers).parent / "python"),
            "model": args.model,
            "dtype": args.dtype,
            "settings": settings,
            "flags": {"jmoe": args.jmoe_options, "transformers": " ".join(words[1][4:])},
            "samples": samples,
        },
    )


if __name__ == "__main__":
    main()
