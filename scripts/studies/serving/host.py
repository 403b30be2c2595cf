"""Measures the host's share of a decode step, apart from the programs that compute it.

An engine decodes a batch of requests that started together. Three times a step: by the clock, from one step's
end to the next one's; the host's own, as the engine reports it (``StepReport.host_seconds``); and that of the
same step's programs alone, run back to back on the last step's input with nothing read in between. Medians
over the steps in which all requests decoded, then over the rounds.
"""

import argparse
import itertools
import statistics
import time
from typing import Any

import numpy as np
from shared.origin import machine
from shared.protocol import Jmoe
from shared.random_checkpoint import checkpoint
from shared.results import smallest

from jmoe.checkpoint import read_config

SMALLEST = {"batch": 2, "context": 32, "new": 4, "rounds": 1}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the ``host`` part of the results."""
    args = smallest(args, SMALLEST)
    # One prompt enters a step, the earlier ones decode: the first answer must outlast the last prompt.
    sizes = {"prompt": args.context + args.batch, "batches": [args.batch], "new": args.new + args.batch}
    with checkpoint(str(args.sizes)) as directory:
        ours = Jmoe(directory, argparse.Namespace(**vars(args) | sizes))
        rng, vocab = np.random.default_rng(0), read_config(directory).vocab_size
        rounds = [
            one_round(ours, rng.integers(0, vocab, (args.batch, args.context)).tolist(), sizes["new"])
            for _ in range(args.rounds + 1)
        ][1:]  # the first round only warms up
    medians = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
    return {
        **machine(("jax",)),
        "model": args.sizes.stem,
        "batch": args.batch,
        "steps": args.new,
        "rounds": args.rounds,
        **medians,
        "host_share": medians["host_ms"] / medians["step_ms"],
        "samples": rounds,
    }


class Clock:
    """A listener of the engine, which records each full step's end and how long the host was busy."""

    def __init__(self, batch: int):
        self.batch = batch
        self.ends: list[float] = []
        self.host_seconds: list[float] = []

    def token(self, request: Any, now: float) -> None: ...

    def finished(self, request: Any, reason: str) -> None: ...

    def stepped(self, report: Any) -> None:
        if report.decode_tokens == self.batch and not report.prompt_tokens:
            self.ends.append(time.perf_counter())
            self.host_seconds.append(report.host_seconds)


class Recorder:
    """A replacement of a runner's ``run``, which keeps the last input in which ``batch`` requests decoded."""

    def __init__(self, runner: Any, batch: int):
        self.run, self.batch, self.last_inputs = runner.run, batch, None
        runner.run = self

    def __call__(self, inputs: Any) -> Any:
        if inputs.phase == "decode" and (inputs.main_rows.positions_BT >= 0).sum() == self.batch:
            self.last_inputs = inputs
        return self.run(inputs)

    def device_seconds(self, steps: int) -> float:
        """Returns the seconds per step of the last step's programs alone, one directly after another."""
        import jax

        sampled = self.run(self.last_inputs).sampled
        jax.block_until_ready(sampled)
        start = time.perf_counter()
        for _ in range(steps):
            sampled = self.run(self.last_inputs).sampled
        jax.block_until_ready(sampled)
        return (time.perf_counter() - start) / steps


def one_round(bench: Jmoe, prompts: list[list[int]], new: int) -> dict[str, float]:
    """Returns milliseconds per step; raises SystemExit if too few reported steps had all requests."""
    clock = Clock(len(prompts))
    bench.engine.listeners.append(clock)
    recorder = Recorder(bench.engine.runner, len(prompts))
    try:
        bench.decode(prompts, new)
    finally:
        bench.engine.listeners.remove(clock)
        bench.engine.runner.run = recorder.run
    if len(clock.ends) < 3:
        raise SystemExit(f"the engine reported {len(clock.ends)} steps of {len(prompts)} decoding requests")
    steps = [b - a for a, b in itertools.pairwise(clock.ends)]
    return {
        "step_ms": statistics.median(steps) * 1e3,
        "host_ms": statistics.median(clock.host_seconds) * 1e3,
        "device_ms": recorder.device_seconds(len(steps)) * 1e3,
    }
