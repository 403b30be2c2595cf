"""Makes the tables of quality for docs/results/capacity.md."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from shared.results import signed, table, verdict
from studies.capacity.load_tables import FACTORS, LOSSLESS, at

KINDS = {  # the columns of a per-domain table, each with its setting without gamma
    "drop, score": "drop/score/expert",
    "random": "drop/random/expert",
    "reverse order": "drop/reverse_order/expert",
    "order": "drop/order/expert",
    "reroute": "reroute/score/expert",
    "expand": "expand/score/expert",
    "drop, device": "drop/score/device",
    "expand, device": "expand/score/device",
}
ORDERED = {metric: f"drop/{metric}/expert/1" for metric in ("random", "reverse_order", "order")}
GAMMAS = [f"gamma = {f:g}" for f in FACTORS]
ORDERINGS = [  # what the paper reports: (text, the worse setting, the better setting)
    ("score hurts less than random", "drop/random/expert", "drop/score/expert"),
    ("random hurts less than order", "drop/order/expert", "drop/random/expert"),
    ("random hurts less than reverse order", "drop/reverse_order/expert", "drop/random/expert"),
    ("expand hurts no more than drop", "drop/score/expert", "expand/score/expert"),
    ("reroute hurts no more than drop", "drop/score/expert", "reroute/score/expert"),
    ("a device's limit hurts less than an expert's (drop)", "drop/score/expert", "drop/score/device"),
    ("a device's limit hurts less than an expert's (expand)", "expand/score/expert", "expand/score/device"),
]


def total(quality: dict[str, Any], setting: str, domain: str | None = None) -> float:
    """Returns the loss in nats a token, of one domain or of all."""
    domains = [domain] if domain else list(quality["tokens"])
    nll = sum(sum(quality["settings"][setting]["nll"][d]) for d in domains)
    return nll / sum(sum(quality["tokens"][d]) for d in domains)


def difference(quality: dict[str, Any], worse: str, better: str = LOSSLESS) -> tuple[float, float]:
    """Returns (nats a token by which ``worse`` is worse over all domains, standard error of that mean).

    The error is the standard error of a ratio whose units are whole documents, drawn within each domain.
    """
    variance, count = 0.0, 0
    for domain, tokens in quality["tokens"].items():
        a, b = (np.asarray(quality["settings"][s]["nll"][domain]) for s in (worse, better))
        tokens_N = np.asarray(tokens)
        rest_N = (a - b) - tokens_N * (a - b).sum() / tokens_N.sum()
        variance += len(rest_N) / max(len(rest_N) - 1, 1) * float(rest_N @ rest_N)
        count += int(tokens_N.sum())
    return total(quality, worse) - total(quality, better), math.sqrt(variance) / count


def lossless(quality: dict[str, Any]) -> float:
    """Returns the loss without a limit, in nats a token."""
    return total(quality, LOSSLESS)


def by_gamma(quality: dict[str, Any], cell: Callable[[str], str], row_name: str) -> str:
    """Returns a table with a row for each policy, metric and scope, and a column for each gamma.

    cell: function that returns the text of a setting's cell.
    row_name: name of expert_drop's row, which has no gamma.
    """
    rows = [[name, *(cell(at(kind, f)) for f in FACTORS)] for name, kind in KINDS.items()]
    rows.append([row_name, cell("expert_drop"), *[""] * (len(FACTORS) - 1)])
    return table(["policy, metric, scope", *GAMMAS], rows)


def damage(quality: dict[str, Any]) -> str:
    def cell(setting: str) -> str:
        return signed(*difference(quality, setting))

    return by_gamma(quality, cell, "expert_drop (3 of 32, no gamma)")


def assignments(quality: dict[str, Any]) -> str:
    return by_gamma(quality, lambda setting: shares(quality["settings"][setting]), "expert_drop")


def orderings(quality: dict[str, Any]) -> str:
    rows = [
        [text, *(judged(*difference(quality, at(a, f), at(b, f))) for f in FACTORS)]
        for text, a, b in ORDERINGS
    ]
    return table(["expected", *GAMMAS], rows)


def positions(quality: dict[str, Any]) -> str:
    """Returns the table of the loss by position in the window. It shows why the order metrics differ."""
    by_name = quality["positions"]
    plain = np.array(by_name[LOSSLESS])
    parts = [f"{quality['length'] * i // len(plain)}.." for i in range(len(plain))]
    rows = [[m, *(f"{d:+.3f}" for d in np.array(by_name[n]) - plain)] for m, n in ORDERED.items()]
    return table(["metric", *parts], rows)


def control(quality: dict[str, Any]) -> str:
    """Returns the table of the loss, and of the loss with other windows on a rank."""
    other = quality["control"]
    rows = [[m, *(signed(*difference(of, n)) for of in (quality, other))] for m, n in ORDERED.items()]
    first = f"{quality['rows']} window(s) of {quality['length']} tokens a rank"
    return table(["metric", first, f"{other['rows']} windows of {other['length']}"], rows)


def perplexities(quality: dict[str, Any], factor: float) -> str:
    """Returns the table of one gamma. It has a row for each domain and one for all domains."""
    columns = {"lossless": LOSSLESS, **{name: at(kind, factor) for name, kind in KINDS.items()}}
    columns["expert_drop"] = "expert_drop"
    rows: list[list[str]] = []
    for domain in [*quality["tokens"], None]:
        label = f"{domain} ({len(quality['tokens'][domain])})" if domain else "**all**"
        rows.append([label, *(f"{math.exp(total(quality, s, domain)):.2f}" for s in columns.values())])
    return table(["domain", *columns], rows)


def perplexity(quality: dict[str, Any]) -> float:
    return math.exp(lossless(quality))


def shares(setting: dict[str, Any]) -> str:
    parts = [setting["dropped"], setting["rerouted"], setting["extra"]]
    return " / ".join(f"{100 * part:.1f}" for part in parts)


def judged(value: float, error: float) -> str:
    """Returns whether the difference confirms the expectation, and the difference."""
    return f"{verdict(value, error)} ({signed(value, error)})"
