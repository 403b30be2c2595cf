"""Compares the figures of docs/results/quantised.md with their targets."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from shared.protocol import JMOE, paired_ratio
from shared.results import table

LLAMA_CPP = "llama.cpp "
DECODE = {  # row: quantisation, llama.cpp's types, least ratio
    "decode 1": [("int8", ("q8_0",), 1.3), ("int4", ("q4_0", "q4_K_M"), 1.2)],
    "decode 8": [("int8", ("q8_0",), 2.0), ("int4", ("q4_0", "q4_K_M"), 1.5)],
    "decode 32": [("int8", ("q8_0",), 2.0), ("int4", ("q4_0", "q4_K_M"), 1.5)],
}
FORMS, ACTIVATIONS = ("int8", "int4", "fp8"), ("", " A8")
PREFILL_A8, PREFILL_A16, PREFILL_LLAMA_CPP = 1.4, 1.0, 2.0
VLLM, STREAMED, START = 1.5, 0.9, 1.5
PERPLEXITY = {"int8": 0.1, "fp8, rows": 0.1, "fp8, 128 x 128": 0.1, "int4, 32, lows": 1.0, "KV int8": 0.05}


class Compared(NamedTuple):
    """A figure and its target.

    what: the figure in words.
    target: the target in words.
    value: the figure.
    is_met: whether the target is met.
    """

    what: str
    target: str
    value: str
    is_met: bool


def targets(parts: dict[str, dict[str, Any] | None]) -> str:
    """Returns the table of all targets whose part was measured, or a line that none was.

    parts: the figures of each part; None is not measured.
    """
    found = [one for part, figures in parts.items() if figures for one in PARTS[part](figures)]
    if not found:
        return "Not measured yet."
    rows = [(one.what, one.target, one.value, "met" if one.is_met else "missed") for one in found]
    return table(("figure", "target", "measured", ""), rows)


def speed(part: dict[str, Any]) -> Iterator[Compared]:
    """Yields the targets of the whole model, for each number of threads."""
    for threads, found in part["threads"].items():
        samples = found["tokens_per_second"]
        for row, wanted in DECODE.items():
            for form, types, least in wanted if row in samples else ():
                for activations in ACTIVATIONS:
                    for other in types:
                        names = f"{JMOE} {form}{activations}", LLAMA_CPP + other
                        yield from _ratio(threads, row, samples[row], *names, least)
        for row in samples:
            if row.startswith("prefill"):
                yield from prefill(threads, row, samples[row])


def prefill(threads: str, row: str, speeds: dict[str, list[float]]) -> Iterator[Compared]:
    """Yields the targets of a row that prefills."""
    best = [max(each) for each in zip(*(s for n, s in speeds.items() if LLAMA_CPP in n), strict=True)]
    beside = speeds | ({"llama.cpp's best": best} if best else {})
    for form in FORMS:
        yield from _ratio(threads, row, beside, f"{JMOE} {form} A8", JMOE, PREFILL_A8)
        yield from _ratio(threads, row, beside, f"{JMOE} {form} A8", "llama.cpp's best", PREFILL_LLAMA_CPP)
        yield from _ratio(threads, row, beside, f"{JMOE} {form}", JMOE, PREFILL_A16)


def _ratio(
    threads: str, row: str, speeds: dict[str, list[float]], ours: str, theirs: str, least: float
) -> Iterator[Compared]:
    """Yields the ratio of two contenders, if both were measured."""
    if ours not in speeds or theirs not in speeds:
        return
    ratio, low, high = paired_ratio(speeds[ours], speeds[theirs])
    base = f"{JMOE} bfloat16" if theirs == JMOE else theirs
    what = f"{threads} thread(s), {row}: {ours} / {base}"
    yield Compared(what, f"at least {least:g}", f"{ratio:.2f} ({low:.2f}..{high:.2f})", ratio >= least)


def vllm(part: dict[str, Any]) -> Iterator[Compared]:
    """Yields the targets of the servers."""
    for form, found in part["forms"].items():
        rows = {f"{count} at a time": row for count, row in found["rows"].items()}
        for name, row in rows.items():
            sides = row["jmoe"]["output_throughput"], row["vllm"]["output_throughput"]
            yield _served(f"{form}, {name}, output tokens/s: jmoe / vLLM", *sides)
        times = found["prefill"]
        sides = times["vllm"]["median_ttft_ms"], times["jmoe"]["median_ttft_ms"]
        length = times["input_len"]
        yield _served(f"{form}, prompt of {length}, time to the first token: vLLM / jmoe", *sides)


def _served(what: str, better: list[float], worse: list[float]) -> Compared:
    ratio, low, high = paired_ratio(better, worse)
    return Compared(what, f"at least {VLLM:g}", f"{ratio:.2f} ({low:.2f}..{high:.2f})", ratio >= VLLM)


def streaming(part: dict[str, Any]) -> Iterator[Compared]:
    """Yields the targets of the experts' kernel, one row an expert."""
    for threads, found in part["threads"].items():
        for form in found["forms"]:
            share = form["bytes_per_s"][0] / form["bandwidth"]
            rounded = "" if form["activations"] == "auto" else ", A8"
            what = f"{threads} thread(s), {form['form']}{rounded}: share of read bandwidth"
            yield Compared(what, f"at least {STREAMED:.0%}", f"{share:.0%}", share >= STREAMED)


def quality(part: dict[str, Any]) -> Iterator[Compared]:
    """Yields the targets of perplexity."""
    for name, most in PERPLEXITY.items():
        if (form := part["forms"].get(name)) is not None:
            change = form["change_percent"]
            value = f"{change:+.3f} ± {form['error_percent']:.3f} %"
            yield Compared(f"{name}: perplexity", f"at most {most:+g} %", value, change <= most)


def start(part: dict[str, Any]) -> Iterator[Compared]:
    """Yields the targets of the server's start."""
    seconds = part["seconds"]
    for name in seconds:
        if name != "bfloat16":
            ratio, low, high = paired_ratio(seconds[name], seconds["bfloat16"])
            value = f"{ratio:.2f} ({low:.2f}..{high:.2f})"
            yield Compared(f"start, {name} / bfloat16", f"at most {START:g}", value, ratio <= START)


PARTS = {"speed": speed, "vllm": vllm, "streaming": streaming, "quality": quality, "start": start}
