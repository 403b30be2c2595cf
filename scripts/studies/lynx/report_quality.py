"""Tables of quality for docs/results/lynx.md."""

import math
from typing import Any

import numpy as np
from shared.results import signed, table, verdict
from studies.lynx.curves import CENTINATS, METHODS, compared, curves, percent

SAVED, ALLOWED = 0.3, 1.0  # the target: share of the active experts saved, % of perplexity
BATCH = "16"  # of the target
RATIOS = (0.8, 0.7, 0.55)  # at which methods are compared
OTHERS = METHODS[1:]


def plain_protocols(quality: dict[str, Any]) -> list[str]:
    return [name for name in quality["runs"] if not name.endswith("/half")]


def quality_part(quality: dict[str, Any]) -> list[str]:
    domains, half = len(quality["domains"]), quality["length"] // 2
    lossless = np.array(quality["runs"][f"single/{BATCH}"]["lossless"]["nll"])
    nats = lossless.mean() / (quality["length"] - 1)
    return [
        f"`{quality['command']}` ({quality['seconds'] / 60:.0f} minutes)",
        "",
        f"The bundled model (32 experts, top 4), teacher-forced decode in lock step: {quality['windows']} "
        f"windows of {quality['length']} tokens of each of {', '.join(quality['domains'])} (the first of "
        "every document, then the second), the same windows everywhere. *single*: all rows of a batch from "
        "one domain; *mixed*: from all domains in turn. All of the context is computed under binning, "
        f"which is harsher than serving (last table). Lossless: {nats:.4f} nats a token, perplexity "
        f"{math.exp(nats):.1f}. Active: experts used in a layer and step over those that plain top-k would "
        "have used. ± is the standard error over windows, paired with the lossless run; windows of one "
        "document are alike, so it is a little small. A batch of one came out bit for bit as without "
        "binning, by every method (checked in the run).",
        "",
        f"**Target**: {SAVED:.0%} fewer active experts at batch {BATCH} for less than {ALLOWED:g} % of "
        "perplexity, read off each method's curve (linear between its settings):",
        "",
        *target_table(quality, (f"single/{BATCH}", f"mixed/{BATCH}"), domains),
        "**Is affinity better than the others at equal active experts?** By how many % of perplexity the "
        "other is "
        'worse; "even" within two standard errors, "-" where a curve does not reach the ratio.',
        "",
        *compared_table(quality, domains),
        *summary(quality, domains),
        "",
        "Curves bend and the lines between settings do not, so that a method with few settings looks worse "
        "between them. Hence the same at the ratios of OEA's own settings, where only affinity is "
        "interpolated:",
        "",
        *own_settings_table(quality, "oea", domains),
        "![quality](lynx_quality.svg)",
        "",
        *settings_tables(quality, domains),
        f"**With the prompt prefilled**: the first {half} tokens of every window losslessly through the "
        f"prefill step, the other {quality['length'] - half} decoded under binning; perplexity change of "
        "those, in %, and of the same tokens where the whole window was decoded under binning:",
        "",
        *half_table(quality, domains),
        "The target in this protocol:",
        "",
        *target_table(quality, (f"single/{BATCH}/half", f"mixed/{BATCH}/half"), domains),
        "![batch](lynx_batch.svg)",
    ]


def target_table(quality: dict[str, Any], protocols: tuple[str, ...], domains: int) -> list[str]:
    rows = []
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
            value, error = percent(delta_N, domains)
            row += [signed(value, error, 2), reached, "met" if value < ALLOWED else "**missed**"]
        rows.append(row)
    head = [
        f"{protocol.split('/')[0]}: {what}" for protocol in protocols
        for what in (f"% at {1 - SAVED:.0%} active", f"active at +{ALLOWED:g} %", "target")
    ]  # fmt: skip
    return table(["method", *head], rows)


def verdicts(quality: dict[str, Any], domains: int) -> dict[tuple[str, float, str], tuple[float, float]]:
    """(protocol, ratio, other method) -> by how much affinity is better, where both curves reach."""
    found = {}
    for protocol in plain_protocols(quality):
        by = curves(quality, protocol)
        for ratio in RATIOS:
            for other in OTHERS:
                if (judged := compared(by["affinity"], by[other], ratio, domains)) is not None:
                    found[protocol, ratio, other] = judged
    return found


def compared_table(quality: dict[str, Any], domains: int) -> list[str]:
    found, rows = verdicts(quality, domains), []
    for ratio in RATIOS:
        for protocol in plain_protocols(quality):
            mix, batch = protocol.split("/")
            cells = [found.get((protocol, ratio, other)) for other in OTHERS]
            words = ["-" if cell is None else f"{verdict(*cell)} ({signed(*cell, 2)})" for cell in cells]
            rows.append([f"{ratio:.0%}", mix, batch, *words])
    return table(["active", "batches", "batch", *(f"better than {other}" for other in OTHERS)], rows)


def summary(quality: dict[str, Any], domains: int) -> list[str]:
    """One line a method: how often affinity was better, even or worse, and where it was worse."""
    found, lines = verdicts(quality, domains), []
    for other in OTHERS:
        words = {key[:2]: verdict(*cell) for key, cell in found.items() if key[2] == other}
        counts = [list(words.values()).count(word) for word in ("yes", "even", "no")]
        worse = [f"{protocol} at {ratio:.0%}" for (protocol, ratio), word in words.items() if word == "no"]
        lines.append(
            f"* against {other}: better in {counts[0]}, even in {counts[1]}, worse in {counts[2]} of "
            f"{len(words)}{' (worse: ' + ', '.join(worse) + ')' if worse else ''}"
        )
    return lines


def own_settings_table(quality: dict[str, Any], other: str, domains: int) -> list[str]:
    """Affinity against another method at that one's own settings."""
    rows = []
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


def change(row: dict[str, Any], key: str, tokens: int, domains: int) -> str:
    return signed(*percent(np.array(row[key]) / CENTINATS / tokens, domains), 2)


def settings_tables(quality: dict[str, Any], domains: int) -> list[str]:
    """Every setting at every batch size: perplexity change in %, active share, remapped share."""
    lines = ["All settings: perplexity change in %, active experts in %, remapped assignments in %.", ""]
    for mix in dict.fromkeys(name.split("/")[0] for name in plain_protocols(quality)):
        runs = {
            n.split("/")[1]: r
            for n, r in quality["runs"].items()
            if n.split("/")[0] == mix and n[-4:] != "half"
        }
        rows = [["plain top-k: experts", *(f"{run['lossless']['active']:.1f}" for run in runs.values())]]
        for name in next(iter(runs.values())):
            if name != "lossless":
                cells = [
                    f"{change(row, 'delta', quality['length'] - 1, domains)}; "
                    f"{100 * row['active'] / row['plain']:.0f}; {100 * row['remapped']:.0f}"
                    for row in (run[name] for run in runs.values())
                ]
                rows.append([name, *cells])
        lines += [f"{mix}:", "", *table(["setting", *(f"batch {batch}" for batch in runs)], rows)]
    return lines


def half_table(quality: dict[str, Any], domains: int) -> list[str]:
    runs, rows = quality["runs"], []
    scored = quality["length"] - 1 - quality["length"] // 2
    mixes = [n.split("/")[0] for n in runs if n.endswith("/half")]
    for name in runs[f"{mixes[0]}/{BATCH}/half"]:
        if name == "lossless":
            continue
        row = [name]
        for mix in mixes:
            prefilled, whole = runs[f"{mix}/{BATCH}/half"][name], runs[f"{mix}/{BATCH}"][name]
            row += [f"{prefilled['active'] / prefilled['plain']:.2f}"]
            row += [change(prefilled, "delta", scored, domains), change(whole, "late", scored, domains)]
        rows.append(row)
    head = [f"{mix}: {what}" for mix in mixes for what in ("active", "prefilled", "all under binning")]
    return table([f"batch {BATCH}", *head], rows)
