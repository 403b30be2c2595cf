"""Makes the tables of quality for docs/results/binning.md."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from shared.results import perplexity_change, signed, table, verdict
from studies.binning.curves import CENTINATS, METHODS, compared, curves

SAVED, ALLOWED = 0.3, 1.0  # the target: share of the active experts saved, % of perplexity
BATCH = "16"  # the target's batch size
RATIOS = (0.8, 0.7, 0.55)  # the ratios at which methods are compared
OTHERS = METHODS[1:]


def plain_protocols(quality: dict[str, Any]) -> list[str]:
    return [name for name in quality["runs"] if not name.endswith("/half")]


def lossless(quality: dict[str, Any]) -> float:
    """Returns the loss without binning, in nats a token."""
    nll = np.array(quality["runs"][f"single/{BATCH}"]["lossless"]["nll"])
    return float(nll.mean()) / (quality["length"] - 1)


def perplexity(quality: dict[str, Any]) -> float:
    return math.exp(lossless(quality))


def target(quality: dict[str, Any], protocols: Sequence[str]) -> str:
    """Returns the table with each method's cost at the target's active experts, and the reverse.

    A row is a method.
    """
    domains, rows = len(quality["domains"]), []
    for method in METHODS:
        row = [method]
        for protocol in protocols:
            curve = curves(quality, protocol)[method]
            delta_N = curve.at(1 - SAVED)
            ratio, crossed = curve.ratio_at(ALLOWED)
            reached = f"{ratio:.2f}" if crossed else f"below {ratio:.2f}"
            if delta_N is None:
                row += ["-", reached, "not reached"]
                continue
            value, error = perplexity_change(delta_N, domains)
            row += [signed(value, error, 2), reached, "met" if value < ALLOWED else "**missed**"]
        rows.append(row)
    head = [
        f"{protocol.split('/')[0]}: {what}" for protocol in protocols
        for what in (f"% at {1 - SAVED:.0%} active", f"active at +{ALLOWED:g} %", "target")
    ]  # fmt: skip
    return table(["method", *head], rows)


def verdicts(quality: dict[str, Any]) -> dict[tuple[str, float, str], tuple[float, float]]:
    """Returns by how much affinity is better, by (protocol, ratio, other method).

    Only the ratios that both curves reach are in it.
    """
    domains, found = len(quality["domains"]), {}
    for protocol in plain_protocols(quality):
        by = curves(quality, protocol)
        for ratio in RATIOS:
            for other in OTHERS:
                if (judged := compared(by["affinity"], by[other], ratio, domains)) is not None:
                    found[protocol, ratio, other] = judged
    return found


def comparison(quality: dict[str, Any]) -> str:
    """Returns the table that says whether affinity is better than each other method.

    A row is a ratio and a protocol.
    """
    found, rows = verdicts(quality), []
    for ratio in RATIOS:
        for protocol in plain_protocols(quality):
            mix, batch = protocol.split("/")
            cells = [found.get((protocol, ratio, other)) for other in OTHERS]
            words = ["-" if cell is None else f"{verdict(*cell)} ({signed(*cell, 2)})" for cell in cells]
            rows.append([f"{ratio:.0%}", mix, batch, *words])
    return table(["active", "batches", "batch", *(f"better than {other}" for other in OTHERS)], rows)


def summary(quality: dict[str, Any], other: str) -> dict[str, Any]:
    """Returns how often affinity was better ("yes"), "even" or worse ("no"), and where it was worse."""
    words = {key[:2]: verdict(*cell) for key, cell in verdicts(quality).items() if key[2] == other}
    counts = {word: list(words.values()).count(word) for word in ("yes", "even", "no")}
    worse = [f"{protocol} at {ratio:.0%}" for (protocol, ratio), word in words.items() if word == "no"]
    return counts | {"of": len(words), "worse": worse}


def own_settings(quality: dict[str, Any], other: str) -> str:
    """Returns the table that compares affinity with another method at the other method's own settings."""
    domains, rows = len(quality["domains"]), []
    for protocol in plain_protocols(quality):
        run, by = quality["runs"][protocol], curves(quality, protocol)
        names = [name for name in run if name.startswith(f"{other}/")]
        row = protocol.split("/")
        for name in names:
            ratio = run[name]["active"] / run[name]["plain"]
            judged = compared(by["affinity"], by[other], ratio, domains)
            row.append(
                f"{ratio:.0%}: " + ("-" if judged is None else f"{verdict(*judged)} ({signed(*judged, 2)})")
            )
        rows.append(row)
    head = [
        f"better than {name}, active"
        for name in next(iter(quality["runs"].values()))
        if name.startswith(other)
    ]
    return table(["batches", "batch", *head], rows)


def change(quality: dict[str, Any], row: dict[str, Any], key: str, tokens: int) -> str:
    return signed(*perplexity_change(np.array(row[key]) / CENTINATS / tokens, len(quality["domains"])), 2)


def mixes(quality: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(name.split("/")[0] for name in plain_protocols(quality)))


def settings(quality: dict[str, Any], mix: str) -> str:
    """Returns a mix's table. A row is a setting, a column is a batch size."""
    runs = {n.split("/")[1]: quality["runs"][n] for n in plain_protocols(quality) if n.split("/")[0] == mix}
    rows = [["plain top-k: experts", *(f"{run['lossless']['active']:.1f}" for run in runs.values())]]
    for name in next(iter(runs.values())):
        if name != "lossless":
            cells = [
                f"{change(quality, row, 'delta', quality['length'] - 1)}; "
                f"{100 * row['active'] / row['plain']:.0f}; {100 * row['remapped']:.0f}"
                for row in (run[name] for run in runs.values())
            ]
            rows.append([name, *cells])
    return table(["setting", *(f"batch {batch}" for batch in runs)], rows)


def prefilled(quality: dict[str, Any]) -> str:
    """Returns the table of windows with a prefilled first half, and of the same tokens of whole windows."""
    runs, rows = quality["runs"], []
    scored = quality["length"] - 1 - quality["length"] // 2
    kinds = [n.split("/")[0] for n in runs if n.endswith("/half")]
    for name in runs[f"{kinds[0]}/{BATCH}/half"]:
        if name == "lossless":
            continue
        row = [name]
        for mix in kinds:
            half, whole = runs[f"{mix}/{BATCH}/half"][name], runs[f"{mix}/{BATCH}"][name]
            row += [f"{half['active'] / half['plain']:.2f}"]
            row += [change(quality, half, "delta", scored), change(quality, whole, "late", scored)]
        rows.append(row)
    head = [f"{mix}: {what}" for mix in kinds for what in ("active", "prefilled", "all under binning")]
    return table([f"batch {BATCH}", *head], rows)
