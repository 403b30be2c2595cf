"""Makes the tables of the simulator's parts for docs/results/offload.md."""

from typing import Any

from shared.results import percent, table
from studies.offload.comparators import BASELINES, VARIED

MAIN = "1/0.25"
SHORT = ("LRU", "LFU", "request counts, LRU", "fMoE", "expert maps, online", "token table", "next gate",
         "default", "oracle")  # fmt: skip
JUDGED = ("default", "next gate", "token table", "expert maps, online", "fMoE")
HIT, TPOT = 0.15, 0.20  # the targets


def comparators(runs: dict[str, Any]) -> str:
    """Returns the table at a quarter of all experts and batch 1. It has a row for each comparator."""
    head = ("comparator", "hit", "late", "copies a step", "useful", "TPOT", "TTFT")
    return table(head, (row(name, figures) for name, figures in runs[MAIN].items()))


def row(name: str, figures: dict[str, float]) -> list[str]:
    useful = percent(figures["useful"]) if figures["prefetched"] else "-"
    return [
        f"`{name}`", percent(figures["hit"]), percent(figures["late"]), f"{figures['copies']:.2f}", useful,
        f"{figures['tpot']:.2f}", f"{figures['ttft']:.1f}",
    ]  # fmt: skip


def best(runs: dict[str, Any]) -> dict[str, float]:
    """Returns the highest hit rate and the shortest time of the baselines."""
    baselines = [runs[MAIN][name] for name in BASELINES]
    return {"hit": max(one["hit"] for one in baselines), "tpot": min(one["tpot"] for one in baselines)}


def gains(runs: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Returns the gains of each judged comparator over the best baseline, as shares of the baseline's value.

    more: additional hits.
    less: saved time.
    """
    least = best(runs)
    return {
        name: {
            "more": runs[MAIN][name]["hit"] / least["hit"] - 1,
            "less": 1 - runs[MAIN][name]["tpot"] / least["tpot"],
        }
        for name in JUDGED
    }


def met(is_met: bool) -> str:
    return "met" if is_met else "**missed**"


def batches(runs: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(key.partition("/")[0] for key in runs))


def shares(runs: dict[str, Any], batch: str) -> list[str]:
    """Returns the budgets of this batch size, as shares of all experts."""
    return [key.partition("/")[2] for key in runs if key.startswith(f"{batch}/")]


def needed(runs: dict[str, Any], batch: str) -> float:
    """Returns the number of experts that a step needs."""
    return runs[f"{batch}/{shares(runs, batch)[0]}"]["LRU"]["needed"]


def grid(runs: dict[str, Any], batch: str) -> str:
    """Returns a batch size's table of hits and time. It has a column for each budget."""
    columns = shares(runs, batch)
    rows = ([f"`{name}`", *(cell(runs[f"{batch}/{share}"][name]) for share in columns)] for name in SHORT)
    return table(["comparator", *(f"{float(share):.0%}" for share in columns)], rows)


def cell(figures: dict[str, float]) -> str:
    return f"{percent(figures['hit'])} / {figures['tpot']:.1f}"


def sensitivity(runs: dict[str, Any]) -> str:
    """Returns the table, which has a row for each value of a parameter."""
    rows = ([what, *(cell(figures[name]) for name in VARIED)] for what, figures in runs.items())
    return table(["", *(f"`{name}`" for name in VARIED)], rows)
