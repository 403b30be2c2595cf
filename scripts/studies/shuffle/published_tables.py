"""Makes the tables of docs/results/shuffle.md on published routing."""

from typing import Any

from shared.results import percent, table
from studies.shuffle.targets import ACROSS, INSIDE, fewer


def published(figures: dict[str, Any]) -> str:
    """Returns a model's table. A row is a pair of domains: that of the statistics and that of the test."""
    rows = []
    for name in figures["domains"]:
        for other in figures["domains"]:
            own, load, random = (
                figures["methods"][method][f"{name}>{other}"] for method in ("alternating", "load", "random")
            )
            rows.append([
                name, other, percent(own["unseen"]), percent(own["local"]),
                percent(load["local"]), percent(random["local"]), percent(saved(figures, name, other)),
                percent(fewer(1 - own["local"], 1 - random["local"])),
                f"{own['peak']:.2f}", f"{load['peak']:.2f}", f"{random['peak']:.2f}",
            ])  # fmt: skip
    head = ["statistics", "test", "unseen ids", "`alternating`, local", "`load`", "`random`"]
    head += ["fewer remote", "than random with tables", "load", "of `load`", "of `random`"]
    return table(head, rows)


def saved(figures: dict[str, Any], name: str, other: str) -> float:
    """Returns the share by which remote activations are fewer than by chance."""
    own = figures["methods"]["alternating"][f"{name}>{other}"]
    return fewer(1 - own["local"], 1 - 1 / figures["ranks"])


def published_means(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the mean savings in-domain and across, each with its target, if such domains exist."""
    domains, means = figures["domains"], {}
    for kind, target in (("in-domain", INSIDE), ("across", ACROSS)):
        values = [saved(figures, a, b) for a in domains for b in domains if (a == b) == (kind == "in-domain")]
        if values:
            means[kind] = {"mean": sum(values) / len(values), "target": target}
    return means
