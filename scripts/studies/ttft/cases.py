"""Measures the time to the first token over the size of the page pool and the number of slots.

For every number of slots and every size of the pool an engine of its own answers requests that come at once,
alone and while others decode, if there are slots for all of them. The engines take turns, all of them in
memory at once (8 GB for the bundled model). A figure is the median of the rounds, in milliseconds; its ratio,
the median of the rounds' own ones, is to the fewest slots that hold as many, with the smallest pool. The pool
of 1 holds what the largest case needs.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from shared.origin import machine
from shared.random_checkpoint import checkpoint
from shared.results import smallest

SMALLEST = {"slots": [1, 4], "pools": [1, 8], "requests": [1, 2], "busy": 1, "rounds": 1, "prompt": 33}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of the study."""
    args = smallest(args, SMALLEST)
    with checkpoint(args.model) as directory:
        cases = measure_cases(directory, args)
    return {
        **machine(("jax",)),
        "model": args.model,
        "threads": args.threads,
        "prompt": args.prompt,
        "rounds": args.rounds,
        "cases": cases,
    }


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


def measure_cases(directory: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
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
