"""Holds the whole-model benchmarks' protocol: options, rows, jmoe as contender, turns, ratios.

No import of this module loads jax, so that ``pinning.pin`` can be called before jax is imported.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Run = tuple[float, list[list[int]]]  # tokens/s, and the generated tokens
Contender = Callable[[list[list[int]], int], Run]  # prompts, tokens to generate for each
Samples = dict[str, dict[str, list[float]]]  # row, contender -> tokens/s of each round
JMOE = "jmoe"
PAUSE = 0.05  # seconds between two contenders, in which the threads of the first go to sleep


@dataclass(frozen=True)
class Row:
    """A line of the result.

    phase: "prefill" or "decode".
    prompts: token ids of each prompt.
    new: number of tokens to generate for each prompt.
    """

    phase: str
    prompts: list[list[int]]
    new: int


# ---- options


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the protocol, which ``check_options`` checks."""
    parser.add_argument("--model", default="tiny", help="tiny, a Hugging Face directory, or a TOML of sizes")
    parser.add_argument("--threads", type=int, default=1, help="cores that everything is pinned to")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prefill row's prompt")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32], help="decode rows")
    parser.add_argument("--context", type=int, default=64, help="tokens of each decode prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens generated for each decode prompt")


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if min(args.rounds, args.prompt, args.context, args.threads, *args.batches) < 1 or args.new < 2:
        parser.error("sizes must be at least 1, and --new at least 2")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options in a form that JSON can hold."""
    return {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items()}


# ---- jmoe


class Jmoe:
    """Runs jmoe's engine step by step.

    directory: folder of the checkpoint.
    args: options of the protocol.
    options: more options of ``LLM``.
    active: number of experts that a layer touched in a decode step, by batch.
    """

    def __init__(self, directory: Path, args: argparse.Namespace, **options: Any):
        from jmoe import LLM

        longest = max(args.prompt + 1, args.context + args.new)
        self.llm = LLM(
            directory,
            dtype=args.dtype,
            max_model_len=longest,
            max_num_seqs=max(args.batches, default=1),
            max_num_batched_tokens=args.prompt,
            enable_prefix_caching=False,  # every round sends the same prompts
            **options,
        )
        self.engine = self.llm.engine
        self.engine.codec = None  # only token ids, as for the other contenders
        self.active: dict[int, float] = {}

    def _requests(self, prompts: list[list[int]], new: int) -> list[Any]:
        from jmoe.engine.request import Request, SamplingParams

        params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True, seed=0)
        now = time.monotonic()
        return [Request(str(i), prompt, params, lambda output: None, now) for i, prompt in enumerate(prompts)]

    def prefill(self, prompts: list[list[int]], new: int) -> Run:
        requests = self._requests(prompts, new)
        start = time.perf_counter()
        self.engine.run(requests)
        return len(prompts[0]) / (time.perf_counter() - start), [r.token_ids for r in requests]

    def decode(self, prompts: list[list[int]], new: int) -> Run:
        requests = self._requests(prompts, new)
        self.engine.add(requests)
        while not all(r.token_ids for r in requests):  # the first requests decode while others prefill
            self.engine.step()
        before, start = sum(len(r.token_ids) for r in requests), time.perf_counter()
        while self.engine.step():
            pass
        seconds = time.perf_counter() - start
        return (len(prompts) * new - before) / seconds, [r.token_ids for r in requests]

    def measure_active(self, prompts: list[list[int]], new: int) -> None:
        def so_far() -> tuple[int, float]:
            decode = self.engine.moe_stats()["decode"]
            return decode["steps"], decode["steps"] * decode["active_experts"]

        steps, active = so_far()
        self.decode(prompts, new)
        steps_now, active_now = so_far()
        self.active[len(prompts)] = (active_now - active) / (steps_now - steps)


# ---- turns


def random_rows(args: argparse.Namespace, vocab: int) -> dict[str, Row]:
    """Returns the rows that the options request, by name. Their prompts are drawn with a fixed seed."""
    import numpy as np

    rng = np.random.default_rng(0)
    rows = {f"prefill {args.prompt}": Row("prefill", rng.integers(0, vocab, (1, args.prompt)).tolist(), 1)}
    for batch in args.batches:
        prompts = rng.integers(0, vocab, (batch, args.context)).tolist()
        rows[f"decode {batch}"] = Row("decode", prompts, args.new)
    return rows


def take_turns(
    rows: dict[str, Row], contenders: dict[str, list[tuple[str, Contender]]], rounds: int
) -> tuple[Samples, dict[str, dict[str, float]]]:
    """Runs each row's contenders strictly in turn, after a warm-up, in opposite order every other round.

    Returns the samples, and the share of each contender's tokens in the last round that equal jmoe's.
    """
    import numpy as np

    samples: Samples = {row: {} for row in rows}
    equal: dict[str, dict[str, float]] = {}
    for turn in range(-1, rounds):  # the first round only warms up
        for name, row in rows.items():
            tokens = {}
            for contender, run in contenders[name][:: 1 if turn % 2 == 0 else -1]:
                time.sleep(PAUSE)
                speed, tokens[contender] = run(row.prompts, row.new if turn >= 0 else min(row.new, 4))
                if turn >= 0:
                    samples[name].setdefault(contender, []).append(speed)
            ours = tokens.pop(JMOE)
            equal[name] = {other: float(np.mean(np.equal(theirs, ours))) for other, theirs in tokens.items()}
    return samples, equal


def paired_ratio(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Returns the median, the least and the greatest of the rounds' ratios ours / theirs."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)
