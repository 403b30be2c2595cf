"""Makes the tables of docs/results/offload.md for the parts that ran an engine."""

from typing import Any

from shared.results import table


def simulated(runs: dict[str, Any]) -> str:
    """Returns the random model's table: a row is a comparator, a column is a batch size and a budget."""
    names = list(next(iter(runs.values())))
    keys = [key.partition("/") for key in runs]
    head = ["comparator", *(f"batch {batch}, {float(share):.0%}" for batch, _, share in keys)]
    rows = (
        [f"`{name}`", *(f"{run[name]['hit']:.1%} / {run[name]['tpot']:.0f}" for run in runs.values())]
        for name in names
    )
    return table(head, rows)


def timed(engine: dict[str, Any]) -> str:
    """Returns the random model's table, which has a row for each run of the engine."""
    rows = (
        [
            f"`{name}`", f"{r['ms']:.1f}", f"{r['hit']:.1%}", f"{r['bytes_step'] / 1e6:.0f}",
            "yes" if r["same"] else "**no**",
        ]
        for name, r in engine.items()
    )  # fmt: skip
    return table(["", "ms", "hit", "MB a step", "tokens as resident"], rows)


def has_oracle(engine: dict[str, Any]) -> bool:
    """Returns whether an oracle ran."""
    return any(name.endswith(" oracle belady") for runs in engine["runs"].values() for name in runs)


def runs(engine: dict[str, Any], batch: str) -> str:
    """Returns a batch size's table, which has a row for each predictor, eviction and budget."""
    rows = []
    for name, run in engine["runs"][batch].items():
        share, _, pair = name.partition(" ")
        resident = name == "resident"
        rows.append([
            "resident" if resident else f"`{pair}`", "100 %" if resident else f"{float(share):.0%}",
            f"{run['pool_bytes'] / 2**20:.1f}",
            hit(run["prefill"], resident), hit(run["decode"], resident),
            f"{run['decode']['bytes_step'] / 2**20:.2f}", f"{run['seconds']:.2f}",
            f"{run['same']} of {engine['requests']}",
        ])  # fmt: skip
    head = ["predictor, eviction", "experts", "pool, MiB", "hit, prompts", "hit, decode"]
    return table([*head, "MiB a decode step", "seconds", "alike"], rows)


def hit(phase: dict[str, Any], resident: bool) -> str:
    return "-" if resident else f"{phase['hit']:.1%}"


def arrivals(figures: dict[str, Any]) -> str:
    """Returns the table of the requests with arrival times. It has a row for each predictor and eviction."""
    rows = (
        [
            f"`{name}`" if name != "resident" else name, f"{run['ttft_ms']:.1f}", f"{run['tpot_ms']:.2f}",
            hit(run["decode"], name == "resident"), f"{run['decode']['bytes_step'] / 2**20:.2f}",
            f"{run['same']} of {figures['requests']}",
        ]
        for name, run in figures["runs"].items()
    )  # fmt: skip
    return table(["predictor, eviction", "TTFT", "TPOT", "hit, decode", "MiB a decode step", "alike"], rows)
