"""``jmoe bench throughput`` and ``latency``: a model in this process, without a server."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from jmoe.engine.build import build_engine
from jmoe.engine.deployment.deployment import resolve
from jmoe.engine.deployment.settings import EngineSettings
from jmoe.engine.engine import Engine
from jmoe.engine.request import Output, Request, SamplingParams
from jmoe.tools.bench.loads import Clipped, LengthLimits, Load, clip
from jmoe.tools.bench.prompts import PromptSource
from jmoe.tools.progress import Progress, counter, silent


@dataclass(frozen=True)
class Round:
    """One round.

    seconds: time from its start to its last token.
    prefill_seconds: time from its start until every request has its first token, in seconds.
    gaps: seconds between the tokens of each request.
    input_tokens: prompt tokens of all requests.
    output_tokens: generated tokens of all requests.
    """

    seconds: float
    prefill_seconds: float
    gaps: list[float]
    input_tokens: int
    output_tokens: int


def run_round(engine: Engine, load: Load, seed: int) -> Round:
    """Serves the load's calls as fast as possible, greedily and to their full lengths, with new prompts."""
    source = PromptSource(range(engine.vocab_size), is_text=False, seed=seed)
    times: list[list[float]] = [[] for _ in load.calls]
    failed: list[str] = []

    def listener(index: int) -> Callable[[Output], None]:
        def emit(output: Output) -> None:
            times[index] += [time.monotonic()] * len(output.token_ids)
            if output.error is not None:
                failed.append(output.error)

        return emit

    requests, now = [], time.monotonic()
    for i, call in enumerate(load.calls):
        params = SamplingParams(max_tokens=call.output_length, temperature=0.0, ignore_eos=True, seed=0)
        requests.append(Request(str(i), source.prompt(i, call, load.block_size), params, listener(i), now))
    start = time.monotonic()
    engine.run(requests)
    seconds = time.monotonic() - start
    if failed:
        raise ValueError(f"{len(failed)} requests failed: {failed[0]}")
    gaps = [b - a for each in times for a, b in pairwise(each)]
    num_input_tokens = sum(len(r.prompt_token_ids) for r in requests)
    return Round(seconds, max(t[0] for t in times) - start, gaps, num_input_tokens, sum(map(len, times)))


def bench_throughput(
    model: str | Path,
    settings: EngineSettings,
    load: Load,
    limits: LengthLimits,
    iterations: int,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Returns medians over ``iterations`` rounds of the whole load, after a round of its first two requests
    to warm up."""
    _check(iterations)
    limits = dataclasses.replace(limits, context=_context(model, settings))
    load, clipped = clip(load, limits)
    with closing(build_engine(model, settings, progress, scores_prompts=False)) as engine:
        run_round(engine, Load(load.calls[:2], False, load.block_size), seed)
        count = counter(progress, "bench")
        runs = [_counted(engine, load, seed + 1 + i, count) for i in range(iterations)]
    seconds = statistics.median(run.seconds for run in runs)
    num_input_tokens, num_output_tokens = runs[0].input_tokens, runs[0].output_tokens
    return {
        "requests": len(load.calls),
        "iterations": iterations,
        "elapsed_time": seconds,
        "rounds": [run.seconds for run in runs],
        "input_tokens": num_input_tokens,
        "output_tokens": num_output_tokens,
        "requests_per_second": len(load.calls) / seconds,
        "tokens_per_second": (num_input_tokens + num_output_tokens) / seconds,
        "output_tokens_per_second": num_output_tokens / seconds,
        "clipped": vars(clipped) | {},
    }


def bench_latency(
    model: str | Path,
    settings: EngineSettings,
    load: Load,
    iterations: int,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measures a batch that starts together: its whole time, the time to all first tokens, and the times
    between tokens."""
    _check(iterations)
    context = _context(model, settings)
    load, clipped = clip(load, LengthLimits(context=context))
    if clipped != Clipped():
        first = load.calls[0]
        raise ValueError(
            f"the context of {context} tokens is too short for that; it holds "
            f"--input-len {first.input_length} --output-len {first.output_length}"
        )
    with closing(build_engine(model, settings, progress, scores_prompts=False)) as engine:
        run_round(engine, load, seed)
        count = counter(progress, "bench")
        runs = [_counted(engine, load, seed + 1 + i, count) for i in range(iterations)]
    return {
        "batch_size": len(load.calls),
        "iterations": iterations,
        **_spread("latency", [run.seconds for run in runs]),
        **_spread("prefill", [run.prefill_seconds for run in runs]),
        **_spread("per_token", [gap for run in runs for gap in run.gaps]),
    }


def _check(iterations: int) -> None:
    if iterations < 1:
        raise ValueError(f"num-iters must be at least 1, got {iterations}")


def _context(model: str | Path, settings: EngineSettings) -> int:
    """Returns the context length, which is known before anything is loaded."""
    return resolve(model, settings).max_model_len


def _counted(engine: Engine, load: Load, seed: int, count: Callable[[int], None]) -> Round:
    run = run_round(engine, load, seed)
    count(1)
    return run


def _spread(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    """Returns the median and P99; None if nothing was measured: answers of one token have no gaps."""
    if not seconds:
        return {f"{name}_median_ms": None, f"{name}_p99_ms": None}
    return {
        f"{name}_median_ms": statistics.median(seconds) * 1e3,
        f"{name}_p99_ms": float(np.percentile(seconds, 99)) * 1e3,
    }
