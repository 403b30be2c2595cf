"""Makes the table of docs/results/ttft.md."""

from typing import Any

from shared.results import table

TARGET = 1.1  # the largest ratio to the smallest engine that holds the case
HEAD = ("slots", "pool", "requests", "others decode", "TTFT, median, ms", "best, ms", "ratio")


def measured(cases: list[dict[str, Any]]) -> str:
    """Returns the table, which has a row for each case."""
    rows = [
        (
            *(str(case[key]) for key in ("slots", "pool", "requests", "busy")),
            f"{case['ttft_ms']:.2f}", f"{case['best_ms']:.2f}", f"{case['ratio']:.2f}",
        )
        for case in cases
    ]  # fmt: skip
    return table(HEAD, rows)
