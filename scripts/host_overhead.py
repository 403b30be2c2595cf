"""The host's share of a decode step, apart from the programs that compute it.

    python scripts/host_overhead.py --model configs/model/olmoe-0.9b.toml --batch 32 --threads 2

An engine decodes ``--batch`` requests that started together. Three times a step: by the clock, from one
step's end to the next one's; the host's own, as the engine reports it (``StepReport.host_seconds``); and that
of the same step's programs alone, run back to back on the last step's input with nothing read in between.
Medians over the steps in which all requests decoded, then over the rounds.

Writes the part "host" of docs/results/serving.json and docs/results/serving.md, which is made from it. Run it
on an otherwise idle machine.
"""

import argparse
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

from shared.origin import command_line, machine
from shared.protocol import Jmoe, checkpoint, pin
from shared.serving_report import write_part


def arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="configs/model/olmoe-0.9b.toml", help="or tiny, or a directory")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--threads", type=int, default=2, help="cores that everything is pinned to")
    parser.add_argument("--batch", type=int, default=32, help="requests that decode together")
    parser.add_argument("--context", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="steps of the whole batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of the results")
    args = parser.parse_args()
    if min(args.batch, args.context, args.rounds, args.threads) < 1 or args.new < 4:
        parser.error("sizes must be at least 1, and --new at least 4")
    return parser, args


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
        """Returns the seconds a step of the last step's programs alone, one directly after another."""
        import jax

        sampled = self.run(self.last_inputs).sampled
        jax.block_until_ready(sampled)
        start = time.perf_counter()
        for _ in range(steps):
            sampled = self.run(self.last_inputs).sampled
        jax.block_until_ready(sampled)
        return (time.perf_counter() - start) / steps


def one_round(bench: Jmoe, prompts: list[list[int]], new: int) -> dict[str, float]:
    """Returns milliseconds a step. Raises SystemExit if the engine reported too few steps of all requests."""
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


def main() -> None:
    parser, args = arguments()
    command = command_line(parser, args)
    pin(args.threads)
    import numpy as np

    from jmoe.checkpoint import read_config

    with checkpoint(args.model) as directory:
        # One prompt enters a step, the earlier ones decode: the first answer must outlast the last prompt.
        args.prompt, args.batches, args.new = args.context + args.batch, [args.batch], args.new + args.batch
        ours = Jmoe(directory, args)
        rng, vocab = np.random.default_rng(0), read_config(directory).vocab_size
        rounds = [
            one_round(ours, rng.integers(0, vocab, (args.batch, args.context)).tolist(), args.new)
            for _ in range(args.rounds + 1)
        ][1:]  # the first round only warms up
    medians = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
    figures = {
        "command": command,
        **machine(("jax",)),
        "model": args.model,
        "batch": args.batch,
        "steps": args.new - args.batch,
        "rounds": args.rounds,
        **medians,
        "host_share": medians["host_ms"] / medians["step_ms"],
        "samples": rounds,
    }
    write_part(args.out, "host", figures)


if __name__ == "__main__":
    main()
