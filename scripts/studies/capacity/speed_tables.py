"""Makes the tables of a layer's speed for docs/results/capacity.md."""

from typing import Any

from shared.results import table
from studies.capacity.load_tables import PAPER_LAYER

NAMES = ("drop/2", "drop/1.5", "drop/1", "expand/2", "expand/1.5", "expand/1")


def sizes(speed: dict[str, Any]) -> str:
    return "; ".join(
        f"{m}: {s['experts']} experts, top {s['k']}, model {s['model']}, inner {s['inner']}, "
        f"{s['tokens']} tokens a rank"
        for m, s in speed["shapes"].items()
    )


def speedups(speed: dict[str, Any], model: str) -> str:
    """Returns a model's table. It has a row for each routing and one for the paper."""
    rows = []
    for name, case in speed["cases"][model].items():
        times = case["plain"]
        split = f"{1e3 * times['seconds']:.2f} ({1e3 * times['experts']:.2f})"
        rows.append([name, split, *(cell(case[setting]) for setting in (*NAMES, "eplb+8"))])
    published = [f"{v:.2f}" for policy in ("drop", "expand") for v in PAPER_LAYER[model][policy]]
    rows.append(["**paper**, 8 x H20", "", *published, "-"])
    return table(["routing", "plain, ms (experts)", *NAMES, "EPLB"], rows)


def cell(timed: dict[str, Any]) -> str:
    median, low, high = timed["speedup"]
    return f"{median:.2f} ({low:.2f}..{high:.2f}); {timed['rows_ratio']:.2f}"
