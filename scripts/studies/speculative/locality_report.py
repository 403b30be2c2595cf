"""The locality part of docs/results/speculative.md: quality against bytes for binning's ``local_bonus``."""

from typing import Any

import numpy as np
from shared.results import signed, table
from studies.lynx.curves import percent

LEAST = 1.0  # % of perplexity within which the cheapest setting is named


def locality_part(locality: dict[str, Any]) -> list[str]:
    domains, length = len(locality["domains"]), locality["length"]
    lines = [
        f"`{locality['command']}` ({locality['seconds'] / 60:.0f} minutes)",
        "",
        "Lossy, off by default, and not in the papers: with `local_bonus` a token likes the experts of its "
        f"own device so many nats more, in decode. The bundled model on {locality['ranks']} expert ranks, "
        f"emulated, experts as the checkpoint numbers them; {locality['windows']} windows of {length} tokens "
        f"of each of {domains} domains, batches of {locality['batch']}. Rows: distinct other ranks that a "
        "token needs in a layer, which is what must travel.",
        "",
    ]
    plain_N = np.array(next(iter(locality["runs"].values()))["0.0"]["nll"])
    for name, runs in locality["runs"].items():
        rows, losses = [], {}
        for bonus, row in runs.items():
            losses[bonus] = loss = percent((np.array(row["nll"]) - plain_N) / (length - 1), domains)
            shares = f"{row['remote']:.1%}", f"{row['rows']:.2f}", f"{row['active']:.1f}"
            rows.append([bonus, *shares, signed(*loss, 2)])
        head = ["bonus, nats", "remote", "rows a token", "active experts", "perplexity, %"]
        lines += [f"With {name}:", "", *table(head, rows)]
        within = [bonus for bonus, loss in losses.items() if loss[0] < LEAST]
        if within:
            best, none = runs[within[-1]]["rows"], runs["0.0"]["rows"]
            lines += [
                f"Within {LEAST:g} % of the lossless perplexity: {within[-1]} nats, "
                f"{1 - best / none:.0%} fewer rows than without the bonus.",
                "",
            ]
    return lines
