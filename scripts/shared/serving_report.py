"""docs/results/serving.json, a part at a time, and the page that is made from it alone."""

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
from pathlib import Path
from typing import Any

from shared.protocol import paired_ratio
from shared.results import dumps, table

HOST_TARGET = 0.05
ROWS = {
    "output_throughput": ("output tokens/s", 1),
    "median_ttft_ms": ("TTFT, median, ms", 1),
    "p99_ttft_ms": ("TTFT, P99, ms", 1),
    "median_tpot_ms": ("TPOT, median, ms", 2),
    "p99_tpot_ms": ("TPOT, P99, ms", 2),
    "median_e2el_ms": ("whole request, median, ms", 1),
}
SERVERS = {"transformers": "transformers serve --continuous-batching", "vllm": "vllm serve"}
# Of each peer: a figure, requests at a time, and between what the ratio jmoe / peer shall lie.
TARGETS = {
    "transformers": [
        ("output_throughput", 32, 3.0, math.inf),
        ("p99_ttft_ms", 32, 0.0, 1.0),
    ],
    "vllm": [
        *(("median_ttft_ms", count, 0.0, 1.0) for count in (1, 8, 32)),
        ("output_throughput", 32, 1.5, math.inf),
    ],
}


def command_line(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """What measures it again: the options that are not at their defaults; not where things lie here."""
    words = [f"python scripts/{parser.prog}"]
    for action in parser._actions:
        value = getattr(args, action.dest, action.default)
        if value == action.default or action.dest in ("out", "peer_command"):
            continue
        values = value if isinstance(value, list) else [value]
        shown = [v.name if isinstance(v, Path) else str(v) for v in values]
        words += [action.option_strings[0], *(repr(v) if " " in v else v for v in shown)]
    return " ".join(words)


def machine(packages: tuple[str, ...], python: Path | None = None) -> dict[str, Any]:
    """date, processor, cores and the packages' versions: those installed here, else those of ``python``."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return {
        "date": datetime.date.today().isoformat(),
        "processor": names[0] if names else "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: _version(name, python) for name in ("jmoe", *packages)},
    }


def _version(name: str, python: Path | None) -> str:
    ask = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    if python is not None and python.exists() and name not in ("jmoe", "jax"):  # the peer's may lie elsewhere
        return subprocess.run([python, "-c", ask, name], capture_output=True, text=True).stdout.strip()
    if name == "jmoe":
        from jmoe import __version__

        return __version__
    return importlib.metadata.version(name)


def write_part(folder: Path, part: str, figures: dict[str, Any]) -> None:
    """Replaces the part in ``serving.json`` and writes ``serving.md`` anew."""
    path = folder / "serving.json"
    folder.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {}
    results[part] = figures
    path.write_text(dumps(results))
    (folder / "serving.md").write_text(page(results))
    print(f"wrote {path} and {folder / 'serving.md'}")


def page(results: dict[str, Any]) -> str:
    lines = ["# Serving on a CPU", ""]
    for peer in ("transformers", "vllm"):
        if peer in results:
            lines += serving(peer, results[peer])
    if "traces" in results:
        lines += traces(results["traces"])
    if "host" in results:
        lines += host(results["host"])
    return "\n".join(lines).rstrip() + "\n"


def _head(part: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {number}" for name, number in part["versions"].items())
    return [
        f"`{part['command']}`",
        "",
        f"{part['date']}; {part['cores']} cores of {part['processor']}; {versions}.",
        "",
    ]


def serving(peer: str, part: dict[str, Any]) -> list[str]:
    asked = part["settings"]
    busy = max(statistics.median(row["jmoe"]["client_cpu_share"]) for row in part["rows"].values())
    lines = [
        f"## jmoe beside `{SERVERS[peer]}`",
        "",
        *_head(part),
        f"Model: {part['model']}, dtype {part['dtype']}. {asked['rounds']} rounds in turn, one server is "
        f"stopped while the other is measured. Medians of the rounds; ratios jmoe / {peer} are the median of "
        f"the rounds' and their range. Flags of the peer: `{part['flags'][peer]}`. The load generator shares "
        f"the machine: it took {busy:.0%} of one core beside jmoe.",
        "",
    ]
    for concurrency, row in part["rows"].items():
        lines += _row(peer, int(concurrency), row)
    return [*lines, *_verdicts(peer, part["rows"]), ""]


def _row(peer: str, concurrency: int, row: dict[str, Any]) -> list[str]:
    ours, theirs = row["jmoe"], row[peer]
    rows = []
    for key, (title, digits) in ROWS.items():
        medians = (f"{statistics.median(side[key]):.{digits}f}" for side in (ours, theirs))
        rows.append([title, *medians, _ratio(ours[key], theirs[key])])
    given, written = map(statistics.median, zip(*ours["tokens"], strict=True))
    return [
        f"{concurrency} at a time; {given:.0f} prompt and {written:.0f} output tokens a round, as many on "
        "both sides:",
        "",
        *table(["", "jmoe", peer, "ratio"], rows),
        "",
    ]


def _ratio(ours: list[float], theirs: list[float]) -> str:
    """Between the tokens of an answer that came in one piece no time passes, and no ratio is one to that."""
    if 0 in theirs:
        return f"- (none in {theirs.count(0)} rounds, where its answers came in one piece)"
    ratio, least, most = paired_ratio(ours, theirs)
    return f"{ratio:.2f} ({least:.2f}..{most:.2f})"


def _verdicts(peer: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    """Which of the peer's targets the rows meet."""
    lines = []
    for key, concurrency, least, most in TARGETS[peer]:
        row = rows.get(str(concurrency))
        if row is None:
            continue
        ratio = paired_ratio(row["jmoe"][key], row[peer][key])[0]
        met = "met" if least <= ratio <= most else "missed"
        bound = f"at least {least:g}" if least else f"at most {most:g}"
        lines.append(
            f"* {ROWS[key][0]}, {concurrency} at a time: {bound} times the peer's: {met} ({ratio:.2f})."
        )
    return ["Targets:", "", *lines] if lines else []


def traces(part: dict[str, Any]) -> list[str]:
    rows = [
        [
            run["trace"],
            run["setting"],
            f"{run['completed']} of {run['completed'] + run['failed']}",
            f"{run['output_throughput']:.0f}",
            f"{run['median_ttft_ms']:.0f}, {run['p99_ttft_ms']:.0f}",
            f"{run['median_tpot_ms']:.1f}, {run['p99_tpot_ms']:.1f}",
            f"{run['median_itl_ms']:.1f}, {run['p99_itl_ms']:.1f}",
            f"{run['median_e2el_ms']:.0f}",
            str(run["max_concurrent_requests"]),
            "-" if run["prefix_hit_rate"] is None else f"{run['prefix_hit_rate']:.1%}",
        ]
        for run in part["runs"]
    ]
    scales = "; ".join(
        f"{name} is `{of['file']}` with lengths times {of['length_scale']:.3g} and times times "
        f"{of['time_scale']:.3g}"
        for name, of in part["scales"].items()
    )
    return [
        "## Recorded arrivals",
        "",
        *_head(part),
        f"Model: {part['model']}, {part['max_num_seqs']} sequences. Open loop: {scales}. Milliseconds, "
        "median and P99; hits are the share of prompt tokens found in the pages.",
        "",
        *table(
            ["trace", "server", "completed", "output tokens/s", "TTFT", "TPOT", "ITL", "E2EL, median",
             "most at once", "hits"],
            rows,
        ),
        *filter(None, map(_cost, part["runs"])),
        "",
    ]  # fmt: skip


def _cost(run: dict[str, Any]) -> str:
    """What a lossy setting did; nothing of the others."""
    if run["quality"] is None:
        return ""
    prompt, decode, moe = run["quality"]["prompt"], run["quality"]["decode"], run["moe"]
    return (
        f"{run['trace']}, {run['setting']} (`{run['flags']}`): {moe['remapped_share']:.1%} of the "
        f"assignments remapped; perplexity of prompts {prompt['perplexity']:.3f}, exact "
        f"{prompt['perplexity_exact']:.3f}; greedy answers cost {decode['nll_difference']:+.4f} nats a token "
        "by the exact model."
    )


def _met(said: str, share: float) -> str:
    return (
        f"{said}: the target of less than {HOST_TARGET:.0%} is {'met' if share < HOST_TARGET else 'missed'}."
    )


def host(part: dict[str, Any]) -> list[str]:
    extra = part["step_ms"] / part["device_ms"] - 1
    return [
        "## What the host takes of a decode step",
        "",
        *_head(part),
        f"Model: {part['model']}. {part['batch']} requests decode together; medians of "
        f"{part['steps']} steps a round, {part['rounds']} rounds.",
        "",
        *table(
            ["", "ms a step"],
            [
                ["a step, from one to the next", f"{part['step_ms']:.3f}"],
                ["the same step's programs alone, back to back", f"{part['device_ms']:.3f}"],
                ["busy host, as the engine reports it", f"{part['host_ms']:.3f}"],
            ],
        ),
        _met(f"The host is busy for {part['host_share']:.1%} of a step", part["host_share"]),
        _met(f"By the clock a step takes {extra:.1%} more than its programs alone", extra),
        "",
    ]
