"""Time to the first token over the size of the page pool and the number of slots.

    python scripts/bench_ttft.py --model tiny --threads 2

Neither may cost anything: what a step takes depends on its tokens alone. For every number of slots and every
size of the pool an engine of its own answers 1, 8 and 32 requests that come at once, alone and while others
decode, wherever there are slots for all of them. The engines take turns, all of them in memory at once (8 GB
for the bundled model). A figure is the median of the rounds, in milliseconds; its ratio, the median of the
rounds' own ones, is to the fewest slots that hold as many, with the smallest pool. The pool of 1 holds what
the largest case needs.

Writes docs/results/ttft.json and docs/results/ttft.md; run it on an otherwise idle machine. With --dry a few
small engines run once each and the table is printed only, in seconds.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from shared.document import render
from shared.origin import command_line, machine
from shared.protocol import checkpoint, pin
from shared.results import dumps, table

TARGET = 1.1
DRY = {"slots": [1, 4], "pools": [1, 8], "requests": [1, 2], "busy": 1, "rounds": 1, "prompt": 33}


def arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="or a TOML of sizes, or a directory")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--threads", type=int, default=2, help="cores that everything is pinned to")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--pools", type=int, nargs="+", default=[1, 8, 64], help="times the smallest pool")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32], help="that come at once")
    parser.add_argument("--busy", type=int, default=4, help="sequences that decode meanwhile")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--rounds", type=int, default=63)
    parser.add_argument("--dry", action="store_true", help="a small form that writes nothing")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of the results")
    args = parser.parse_args()
    if args.dry:
        vars(args).update(DRY)
    sizes = (args.threads, args.busy, args.prompt, args.rounds, *args.slots, *args.pools, *args.requests)
    if min(sizes) < 1:
        parser.error("sizes must be at least 1")
    return parser, args


class Bench:
    """An engine with ``slots`` slots and ``pool`` times the pages that the largest case needs."""

    def __init__(self, directory: Path, args: argparse.Namespace, slots: int, pool: int):
        from jmoe import LLM
        from jmoe.checkpoint import read_config
        from jmoe.engine.deployment.sizes import PAGE_SIZE
        from jmoe.mesh import make_mesh, split_attention
        from jmoe.nn.kinds import page_bytes

        cfg = read_config(directory)
        longest = args.prompt + 4 * PAGE_SIZE
        pages = (max(args.requests) + args.busy) * -(-longest // PAGE_SIZE)
        self.prompt, self.vocab, self.room = args.prompt, cfg.vocab_size, longest - args.prompt - 1
        self.engine = LLM(
            directory,
            dtype=args.dtype,
            max_model_len=longest,
            max_num_seqs=slots,
            max_num_batched_tokens=512,
            kv_memory=pool * pages * page_bytes(cfg, split_attention(make_mesh(), "dp"), PAGE_SIZE),
            enable_prefix_caching=False,
            warm_up=False,
        ).engine
        self.engine.codec = None  # only token ids
        self.num_requests = 0

    def _requests(self, count: int, new: int) -> list[Any]:
        import numpy as np

        from jmoe.engine.request import Request, SamplingParams

        rng = np.random.default_rng(self.num_requests)
        prompts = rng.integers(0, self.vocab, (count, self.prompt)).tolist()
        params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True, seed=0)
        self.num_requests += count
        now = time.monotonic()
        return [
            Request(f"{self.num_requests}-{i}", prompt, params, lambda output: None, now)
            for i, prompt in enumerate(prompts)
        ]

    def first_tokens(self, count: int, busy: int) -> list[float]:
        """Measures the milliseconds to the first token of ``count`` requests while ``busy`` others decode."""
        others = self._requests(busy, self.room)
        self.engine.add(others)
        while not all(request.token_ids for request in others):
            self.engine.step()
        requests = self._requests(count, 1)
        start = time.monotonic()
        self.engine.add(requests)
        while not all(request.token_ids for request in requests):
            self.engine.step()
        for request in others:
            self.engine.abort(request.id)
        while self.engine.busy:
            self.engine.step()
        return [(request.first_token_time - start) * 1e3 for request in requests]


def measure(directory: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns one entry a case: slots, pool, requests, busy, ttft_ms, best_ms, ratio."""
    sizes = [(slots, pool) for slots in sorted(args.slots) for pool in sorted(args.pools)]
    benches = {size: Bench(directory, args, *size) for size in sizes}
    found = []
    for count in sorted(args.requests):
        for busy in (0, args.busy):
            fit = [size for size in sizes if count + busy <= size[0]]
            rounds = in_turn([benches[size] for size in fit], count, busy, args.rounds)
            for (slots, pool), times in zip(fit, rounds, strict=True):
                case = {"slots": slots, "pool": pool, "requests": count, "busy": busy}
                ratio = statistics.median(own / first for own, first in zip(times, rounds[0], strict=True))
                found.append(
                    case | {"ttft_ms": statistics.median(times), "best_ms": min(times), "ratio": ratio}
                )
    return found


def in_turn(benches: list[Bench], count: int, busy: int, rounds: int) -> list[list[float]]:
    """Returns a list of rounds for each engine.

    The engines take turns, so that all of them are slower when the machine is slower for a while.
    """
    for bench in benches:
        for _ in range(2):  # one run compiles, one warms up
            bench.first_tokens(count, busy)
    times = [[statistics.median(bench.first_tokens(count, busy)) for bench in benches] for _ in range(rounds)]
    return [list(of_one) for of_one in zip(*times, strict=True)]


def document(figures: dict[str, Any]) -> str:
    head = ("slots", "pool", "requests", "others decode", "TTFT, median, ms", "best, ms", "ratio")
    rows = [
        (
            *(str(case[key]) for key in ("slots", "pool", "requests", "busy")),
            f"{case['ttft_ms']:.2f}", f"{case['best_ms']:.2f}", f"{case['ratio']:.2f}",
        )
        for case in figures["cases"]
    ]  # fmt: skip
    made = {"target": TARGET, "table": table(head, rows)}
    return render(Path(__file__).parent / "shared/ttft.md", made | figures)


def main() -> None:
    parser, args = arguments()
    command = f"python scripts/{parser.prog} --dry" if args.dry else command_line(parser, args)
    pin(args.threads)
    with checkpoint(args.model) as directory:
        cases = measure(directory, args)
    figures = {
        "command": command, **machine(("jax",)), "model": args.model, "threads": args.threads,
        "prompt": args.prompt, "rounds": args.rounds, "cases": cases,
    }  # fmt: skip
    text = document(figures)
    print(text)
    if not args.dry:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "ttft.json").write_text(dumps(figures, depth=1), encoding="utf-8")
        (args.out / "ttft.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
