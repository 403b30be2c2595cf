"""Tables of quality for docs/results/capacity.md."""

import math
from typing import Any

import numpy as np
from shared.results import signed, table, verdict
from studies.capacity.report_load import FACTORS, LOSSLESS, at

KINDS = {  # column of a per-domain table -> setting without gamma
    "drop, score": "drop/score/expert",
    "random": "drop/random/expert",
    "reverse order": "drop/reverse_order/expert",
    "order": "drop/order/expert",
    "reroute": "reroute/score/expert",
    "expand": "expand/score/expert",
    "drop, device": "drop/score/device",
    "expand, device": "expand/score/device",
}
ORDERINGS = [  # what the paper has (text, the worse, the better)
    ("score hurts less than random", "drop/random/expert", "drop/score/expert"),
    ("random hurts less than order", "drop/order/expert", "drop/random/expert"),
    ("random hurts less than reverse order", "drop/reverse_order/expert", "drop/random/expert"),
    ("expand hurts no more than drop", "drop/score/expert", "expand/score/expert"),
    ("reroute hurts no more than drop", "drop/score/expert", "reroute/score/expert"),
    ("a device's limit hurts less than an expert's (drop)", "drop/score/expert", "drop/score/device"),
    ("a device's limit hurts less than an expert's (expand)", "expand/score/expert", "expand/score/device"),
]


def total(quality: dict[str, Any], setting: str, domain: str | None = None) -> float:
    """Nats a token, of one domain or of all."""
    domains = [domain] if domain else list(quality["tokens"])
    nll = sum(sum(quality["settings"][setting]["nll"][d]) for d in domains)
    return nll / sum(sum(quality["tokens"][d]) for d in domains)


def difference(quality: dict[str, Any], worse: str, better: str = LOSSLESS) -> tuple[float, float]:
    """(nats a token by which ``worse`` is worse over all domains, standard error of that mean).

    The error is that of a ratio whose units are whole documents, drawn within each domain.
    """
    variance, count = 0.0, 0
    for domain, tokens in quality["tokens"].items():
        a, b = (np.asarray(quality["settings"][s]["nll"][domain]) for s in (worse, better))
        tokens_N = np.asarray(tokens)
        rest_N = (a - b) - tokens_N * (a - b).sum() / tokens_N.sum()
        variance += len(rest_N) / max(len(rest_N) - 1, 1) * float(rest_N @ rest_N)
        count += int(tokens_N.sum())
    return total(quality, worse) - total(quality, better), math.sqrt(variance) / count


def quality_part(quality: dict[str, Any]) -> list[str]:
    settings = quality["settings"]
    documents = sum(map(len, quality["tokens"].values()))
    scored = sum(map(sum, quality["tokens"].values()))
    gammas = [f"gamma = {f:g}" for f in FACTORS]
    drop = {k: [at(kind, f) for f in FACTORS] for k, kind in KINDS.items()}
    expert_drop = settings["expert_drop"]
    lines = [
        f"`{quality['command']}`",
        "",
        "The bundled model on the valid split, prefill (as in the paper; decode is lossless here), 8 expert "
        f"ranks emulated on a CPU, {quality['rows']} window(s) of {quality['length']} tokens a rank and "
        "step, each rank's capacity counting its own tokens. "
        f"{quality['budget']} tokens a domain, {scored} in all, of {documents} documents (first windows of "
        "every document first). Lossless: "
        f"{total(quality, LOSSLESS):.4f} nats a token, perplexity {math.exp(total(quality, LOSSLESS)):.2f}. "
        f"± is the standard error of the mean over documents, paired with the same documents elsewhere and "
        f"stratified by domain; several domains have three documents or fewer, so it is a rough one.",
        "",
        "Damage against lossless, nats a token:",
        "",
        *table(
            ["policy, metric, scope", *gammas],
            [[name, *(signed(*difference(quality, s)) for s in names)] for name, names in drop.items()]
            + [["expert_drop (3 of 32, no gamma)", signed(*difference(quality, "expert_drop")), "", "", ""]],
        ),
        "What became of the router's assignments: dropped, rerouted, and extra ones that expand added, % :",
        "",
        *table(
            ["policy, metric, scope", *gammas],
            [[name, *(shares(settings[s]) for s in names)] for name, names in drop.items()]
            + [["expert_drop", shares(expert_drop), "", "", ""]],
        ),
        "The paper's orderings, as paired differences (the first named minus the better, nats a token):",
        "",
        *table(
            ["expected", *gammas],
            [
                [text, *(judged(*difference(quality, at(a, f), at(b, f))) for f in FACTORS)]
                for text, a, b in ORDERINGS
            ],
        ),
        *order_part(quality),
        "Perplexity by domain (documents in brackets):",
        "",
    ]
    for factor in FACTORS:
        columns = {name: at(kind, factor) for name, kind in KINDS.items()} | {"expert_drop": "expert_drop"}
        rows: list[list[str]] = []
        for domain in [*quality["tokens"], None]:
            label = f"{domain} ({len(quality['tokens'][domain])})" if domain else "**all**"
            names = [LOSSLESS, *columns.values()]
            rows.append([label, *(f"{math.exp(total(quality, s, domain)):.2f}" for s in names)])
        lines += [f"gamma = {factor:g}", "", *table(["domain", "lossless", *columns], rows)]
    return lines


def order_part(quality: dict[str, Any]) -> list[str]:
    """Why the order metrics differ: the loss by position, and other windows on a rank."""
    control, positions = quality["control"], quality["positions"]
    names = {metric: f"drop/{metric}/expert/1" for metric in ("random", "reverse_order", "order")}
    plain = np.array(positions[LOSSLESS])
    parts = [f"{quality['length'] * i // len(plain)}.." for i in range(len(plain))]
    by_part = [[m, *(f"{d:+.3f}" for d in np.array(positions[n]) - plain)] for m, n in names.items()]
    compared = [
        [m, signed(*difference(quality, n)), signed(*difference(control, n))] for m, n in names.items()
    ]
    first = f"{quality['rows']} window(s) of {quality['length']} tokens a rank"
    second = f"{control['rows']} windows of {control['length']}"
    return [
        "Damage of drop at gamma = 1 by position in the window, nats a token (all domains):",
        "",
        *table(["metric", *parts], by_part),
        "Damage of drop at gamma = 1, and the same with other windows on a rank:",
        "",
        *table(["metric", first, second], compared),
    ]


def shares(setting: dict[str, Any]) -> str:
    parts = [setting["dropped"], setting["rerouted"], setting["extra"]]
    return " / ".join(f"{100 * part:.1f}" for part in parts)


def judged(value: float, error: float) -> str:
    """The difference and whether it bears the expectation out."""
    return f"{verdict(value, error)} ({signed(value, error)})"
