"""The report of a serving benchmark as text: the block that vLLM prints, then facts that vLLM lacks."""

import math
from typing import Any

from jmoe.config.counters import LOSSY, names

WIDTH = 50
TITLES = {
    "ttft": ("Time to First Token", "TTFT"),
    "tpot": ("Time per Output Token (excl. 1st token)", "TPOT"),
    "itl": ("Inter-token Latency", "ITL"),
    "e2el": ("End-to-end Latency", "E2EL"),
}
LATE = 0.1  # share of the median TTFT: a generator that is later than this measured itself


def line(name: str, value: float | str | None) -> str:
    shown = f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{name:<40} {shown:<10}".rstrip()


def block(report: dict[str, Any]) -> list[str]:
    """Returns the lines of ``============ Serving Benchmark Result ============``."""
    settings = report["settings"]
    lines = [
        f"{' Serving Benchmark Result ':=^{WIDTH}}",
        line("Successful requests:", report["completed"]),
        line("Failed requests:", report["failed"]),
    ]
    if settings["max_concurrency"]:
        lines.append(line("Maximum request concurrency:", settings["max_concurrency"]))
    if settings["request_rate"] is not None and not math.isinf(float(settings["request_rate"])):
        lines.append(line("Request rate configured (RPS):", float(settings["request_rate"])))
    lines += [
        line("Benchmark duration (s):", report["duration"]),
        line("Total input tokens:", report["total_input_tokens"]),
        line("Total generated tokens:", report["total_output_tokens"]),
        line("Request throughput (req/s):", report["request_throughput"]),
    ]
    if report["request_goodput"] is not None:
        lines.append(line("Request goodput (req/s):", report["request_goodput"]))
    lines += [
        line("Output token throughput (tok/s):", report["output_throughput"]),
        line("Peak output token throughput (tok/s):", float(report["max_output_tokens_per_s"])),
        line("Peak concurrent requests:", report["max_concurrent_requests"]),
        line("Total token throughput (tok/s):", report["total_token_throughput"]),
    ]
    for name, (title, short) in TITLES.items():
        lines.append(f"{title:-^{WIDTH}}")
        for kind in ("mean", "median", "p99"):
            label = f"{kind.capitalize()} {short} (ms):"
            lines.append(line(label, report[f"{kind}_{name}_ms"]))
    return [*lines, "=" * WIDTH]


def notes(report: dict[str, Any]) -> list[str]:
    """Returns other facts that a reader must know: failures, clipping, lateness, caching, lossy
    techniques."""
    lines = [f"failed, {count} times: {cause}" for cause, count in report["failures"].items()]
    clipped = report["clipped"]
    if any(clipped.values()):
        lines.append(
            f"clipped: {clipped['input']} prompts, {clipped['output']} answers, {clipped['context']} to the "
            f"model's context; {clipped['input_tokens']} and {clipped['output_tokens']} tokens in all"
        )
    late = report["lag"]
    if report["timed"]:
        lines.append(
            f"sent late by (ms): median {late['median_ms']:.2f}, P99 {late['p99_ms']:.2f}, "
            f"max {late['max_ms']:.2f}"
        )
        if late["p99_ms"] > LATE * report["median_ttft_ms"] and report["completed"]:
            lines.append("WARNING: this generator lagged: the load was not the one asked for")
    if report["tokens_counted_by"] == "events":
        lines.append("the server reports no usage: generated tokens are events of the streams")
    if report["prefix_hit_rate"] is not None:
        lines.append(f"prompt tokens found in the server's prefix cache: {report['prefix_hit_rate']:.1%}")
    moe = report["moe"]
    if moe is not None:
        shares = ", ".join(f"{k} {moe[f'{k}_share']:.2%}" for k in names(LOSSY))
        lines.append(f"lossy techniques, of {moe['assignments']} expert assignments: {shares}")
    return lines + (quality_lines(report["quality"]) if report["quality"] is not None else [])


def quality_lines(quality: dict[str, Any]) -> list[str]:
    """Returns lines that compare exact answers with answers as served, by prompt scoring and by
    generation."""
    prompt, decode = quality["prompt"], quality["decode"]
    return [
        f"{' Quality ':-^{WIDTH}}",
        line("Scored prompt tokens:", prompt["tokens"]),
        f"{'Perplexity, as served:':<40} {prompt['perplexity']:.4f}",
        f"{'Perplexity, exact:':<40} {prompt['perplexity_exact']:.4f}",
        f"{'Difference (nats a token):':<40} {prompt['nll_difference']:+.5f}",
        line("Generated tokens:", decode["tokens"]),
        f"{'Equal to the exact ones:':<40} {decode['equal_share']:.2%}",
        f"{'Exact NLL of the answers as served:':<40} {decode['nll']:.4f}",
        f"{'Exact NLL of the exact answers:':<40} {decode['nll_exact']:.4f}",
        f"{'Difference (nats a token):':<40} {decode['nll_difference']:+.5f}",
        "Scoring a prompt is prefill: it does not see what acts in decode only (binning);",
        "the answers do. They are greedy, and the exact model scores both kinds of them.",
        "=" * WIDTH,
    ]
