"""Makes the tables of the locality part of docs/results/shuffle.md: quality against bytes."""

from typing import Any

import numpy as np
from shared.results import perplexity_change, signed, table

LEAST = 1.0  # % of perplexity; the cheapest setting within it is named


def losses(locality: dict[str, Any], name: str) -> dict[str, tuple[float, float]]:
    """Returns by bonus the change of perplexity in % from no binning and no bonus, and its standard error."""
    plain_N = np.array(next(iter(locality["runs"].values()))["0.0"]["nll"])
    scored, domains = locality["length"] - 1, len(locality["domains"])
    return {
        bonus: perplexity_change((np.array(row["nll"]) - plain_N) / scored, domains)
        for bonus, row in locality["runs"][name].items()
    }


def bonuses(locality: dict[str, Any], name: str) -> str:
    """Returns a binning's table. It has a row for each bonus."""
    rows, by_bonus = [], losses(locality, name)
    for bonus, row in locality["runs"][name].items():
        shares = f"{row['remote']:.1%}", f"{row['rows']:.2f}", f"{row['active']:.1f}"
        rows.append([bonus, *shares, signed(*by_bonus[bonus], 2)])
    return table(["bonus, nats", "remote", "rows a token", "active experts", "perplexity, %"], rows)


def within(locality: dict[str, Any], name: str) -> list[str]:
    """Returns the bonuses that cost less than ``LEAST``."""
    return [bonus for bonus, loss in losses(locality, name).items() if loss[0] < LEAST]
