"""Makes the tables and the single figures of docs/results/serving.md."""

import math
import statistics
from typing import Any

from shared.protocol import paired_ratio
from shared.results import table

HOST_TARGET = 0.05
TOOLS_TARGET = 1.05
ROWS = {
    "output_throughput": ("output tokens/s", 1),
    "median_ttft_ms": ("TTFT, median, ms", 1),
    "p99_ttft_ms": ("TTFT, P99, ms", 1),
    "median_tpot_ms": ("TPOT, median, ms", 2),
    "p99_tpot_ms": ("TPOT, P99, ms", 2),
    "median_e2el_ms": ("whole request, median, ms", 1),
}
SERVERS = {"transformers": "transformers serve --continuous-batching", "vllm": "vllm serve"}
# The targets of each peer: a figure, the requests at a time, the least and the greatest ratio jmoe / peer.
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


def client_share(part: dict[str, Any]) -> float:
    """Returns the largest share of one core that the load generator used with jmoe, over all rows."""
    return max(statistics.median(row["jmoe"]["client_cpu_share"]) for row in part["rows"].values())


def tokens(row: dict[str, Any]) -> dict[str, float]:
    """Returns the median tokens of a round, for prompts and for answers."""
    num_input, num_output = map(statistics.median, zip(*row["jmoe"]["tokens"], strict=True))
    return {"given": num_input, "written": num_output}


def compared(peer: str, row: dict[str, Any]) -> str:
    """Returns the table with the medians of both sides and their ratio. A row is a figure."""
    ours, theirs = row["jmoe"], row[peer]
    rows = []
    for key, (title, digits) in ROWS.items():
        medians = (f"{statistics.median(side[key]):.{digits}f}" for side in (ours, theirs))
        rows.append([title, *medians, ratio(ours[key], theirs[key])])
    return table(["", "jmoe", peer, "ratio"], rows)


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Returns the ratio ours / theirs. It has none if no time passed, because an answer came in one piece."""
    if 0 in theirs:
        return f"- (none in {theirs.count(0)} rounds, where its answers came in one piece)"
    ratio, least, most = paired_ratio(ours, theirs)
    return f"{ratio:.2f} ({least:.2f}..{most:.2f})"


def targets(peer: str, rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns a record for each of the peer's targets that was measured, with its verdict."""
    found = []
    for key, concurrency, least, most in TARGETS[peer]:
        if (row := rows.get(str(concurrency))) is not None:
            median = paired_ratio(row["jmoe"][key], row[peer][key])[0]
            bound = f"at least {least:g}" if least else f"at most {most:g}"
            found.append({
                "figure": ROWS[key][0], "concurrency": concurrency, "bound": bound, "ratio": median,
                "verdict": "met" if least <= median <= most else "missed",
            })  # fmt: skip
    return found


def scales(traces: dict[str, Any]) -> str:
    return "; ".join(
        f"{name} is `{of['file']}` with lengths times {of['length_scale']:.3g} and times times "
        f"{of['time_scale']:.3g}"
        for name, of in traces["scales"].items()
    )


def replayed(traces: dict[str, Any]) -> str:
    """Returns the table, which has a row for each trace and server."""
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
        for run in traces["runs"]
    ]
    head = ["trace", "server", "completed", "output tokens/s", "TTFT", "TPOT", "ITL", "E2EL, median"]
    return table([*head, "most at once", "hits"], rows)


def step(host: dict[str, Any]) -> str:
    """Returns the table of the milliseconds of a decode step."""
    rows = [
        ["a step, from one to the next", f"{host['step_ms']:.3f}"],
        ["the same step's programs alone, back to back", f"{host['device_ms']:.3f}"],
        ["busy host, as the engine reports it", f"{host['host_ms']:.3f}"],
    ]
    return table(["", "ms a step"], rows)


def tools(part: dict[str, Any]) -> str:
    """Returns the table of the times per token, with tools and without."""
    rows = []
    for count, times in part["rows"].items():
        medians = (f"{statistics.median(times[kind]):.2f}" for kind in ("text", "tools"))
        median, least, most = paired_ratio(times["tools"], times["text"])
        verdict = "met" if median <= TOOLS_TARGET else "missed"
        rows.append([count, *medians, f"{median:.3f} ({least:.3f}..{most:.3f})", verdict])
    head = ["at a time", "TPOT without tools, ms", "with tools, ms", "ratio", f"at most {TOOLS_TARGET}"]
    return table(head, rows)


def met(share: float) -> str:
    return "met" if share < HOST_TARGET else "missed"
