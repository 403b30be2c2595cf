"""The measures of a run, under the names that ``vllm bench serve`` writes."""

import collections
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jmoe.config.counters import LOSSY, USAGE, names
from jmoe.tools.bench.answers import Result
from jmoe.tools.bench.replay import Replay

LATENCIES = ("ttft", "tpot", "itl", "e2el")


def latencies(results: Iterable[Result]) -> dict[str, list[float]]:
    """Returns latencies in milliseconds: to the first token; per later token, by request; between tokens; of
    whole requests."""
    found: dict[str, list[float]] = {name: [] for name in LATENCIES}
    for r in results:
        found["ttft"].append((r.first_token_time - r.send_time) * 1e3)
        if (each := per_token(r)) is not None:
            found["tpot"].append(each)
        found["itl"] += [gap * 1e3 for gap in r.gaps]
        found["e2el"].append((r.end_time - r.send_time) * 1e3)
    return found


def per_token(r: Result) -> float | None:
    """Returns the milliseconds per token after the first; None if there is no second token."""
    return (r.end_time - r.first_token_time) * 1e3 / (r.output_tokens - 1) if r.output_tokens > 1 else None


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Returns statistics of ``values``; zeros if nothing was measured, as in vLLM."""
    some = values or [0.0]
    return {
        f"mean_{name}_ms": float(np.mean(some)),
        f"median_{name}_ms": float(np.median(some)),
        f"std_{name}_ms": float(np.std(some)),
        f"p90_{name}_ms": float(np.percentile(some, 90)),
        f"p99_{name}_ms": float(np.percentile(some, 99)),
    }


def peak_concurrency(results: Iterable[Result]) -> int:
    """Returns the largest number of requests that were in flight together."""
    changes = [(r.send_time, 1) for r in results] + [(r.end_time, -1) for r in results]
    now = most = 0
    for _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most


def peak_tokens(results: Iterable[Result]) -> int:
    """Returns the number of token events in the busiest second."""
    times = [t for r in results for t in r.token_times]
    start = min(times, default=0.0)
    seconds = collections.Counter(int(t - start) for t in times)
    return max(seconds.values(), default=0)


def goodput(results: Sequence[Result], limits: dict[str, float], seconds: float) -> float:
    """Returns the requests per second within every limit.

    limits: milliseconds by name of ``LATENCIES``, except itl.
    """
    good = 0
    for r in results:
        measured = {"ttft": (r.first_token_time - r.send_time) * 1e3, "tpot": per_token(r) or 0.0}
        measured["e2el"] = (r.end_time - r.send_time) * 1e3
        good += all(measured[name] <= most for name, most in limits.items())
    return good / seconds


def lossy_counts(results: Iterable[Result]) -> dict[str, float] | None:
    """Returns the assignments of tokens to experts and what lossy techniques did to them, in total and as
    shares; None if the server reports none."""
    counts = [r.moe for r in results if r.moe is not None]
    if not counts:
        return None
    total = {name: sum(moe.get(name, 0) for moe in counts) for name in names(USAGE)}
    shares = {f"{name}_share": total[name] / max(total["assignments"], 1) for name in names(LOSSY)}
    return {**total, **shares}


def lag(results: Iterable[Result]) -> dict[str, float]:
    """Returns the milliseconds by which requests were sent after they were due."""
    late = [r.lag * 1e3 for r in results] or [0.0]
    median, p99 = np.percentile(late, [50, 99]).tolist()
    return {"median_ms": median, "p99_ms": p99, "max_ms": max(late)}


def summary(replay: Replay, limits: dict[str, float] | None = None) -> dict[str, Any]:
    """Returns all measures of a run. Failed requests are counted by cause; among the other measures they
    affect only the duration, the peak concurrency, the lag and the client's CPU time."""
    good = [r for r in replay.results if r.cause is None]
    failed = collections.Counter(r.cause for r in replay.results if r.cause is not None)
    seconds = replay.seconds
    num_input_tokens = sum(r.input_tokens for r in good)
    num_output_tokens = sum(r.output_tokens for r in good)
    measured = latencies(good)
    return {
        "duration": seconds,
        "completed": len(good),
        "failed": sum(failed.values()),
        "failures": dict(failed.most_common()),
        "total_input_tokens": num_input_tokens,
        "total_output_tokens": num_output_tokens,
        "tokens_counted_by": "usage" if all(r.has_usage for r in good) else "events",
        "request_throughput": len(good) / seconds,
        "request_goodput": goodput(good, limits, seconds) if limits else None,
        "output_throughput": num_output_tokens / seconds,
        "total_token_throughput": (num_input_tokens + num_output_tokens) / seconds,
        "max_output_tokens_per_s": peak_tokens(good),
        "max_concurrent_requests": peak_concurrency(replay.results),
        **{k: v for name in LATENCIES for k, v in spread(name, measured[name]).items()},
        "lag": lag(replay.results),
        "client_cpu_share": replay.cpu_seconds / seconds,
        "moe": lossy_counts(good),
    }


def details(results: Sequence[Result]) -> dict[str, list[Any]]:
    """Returns one entry per request, in the order in which they were due; times are in seconds from the first
    request."""
    start = min(r.send_time for r in results)
    return {
        "start_times": [r.send_time - start for r in results],
        "lags": [r.lag for r in results],
        "input_lens": [r.input_tokens for r in results],
        "output_lens": [r.output_tokens for r in results],
        "ttfts": [r.first_token_time - r.send_time if r.cause is None else None for r in results],
        "itls": [r.gaps for r in results],
        "e2els": [r.end_time - r.send_time for r in results],
        "moe": [r.moe for r in results],
        "errors": [r.cause for r in results],
    }
