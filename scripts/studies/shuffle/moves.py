"""Counts the tokens that change devices from one layer to the next. The residual rows of these tokens move.

The placement is that of ``alternating`` with its tables of token ids, in-domain. The statistics, test tokens
and steps are those of the part grouping. Tokens come to the first layer, and leave the last one, in equal
chunks of the step.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from shared.text_routing import collect
from studies.shuffle.grouping import RANKS, SIZES, homes, log
from studies.shuffle.placed_tokens import dealt_ranks, shuffled_ranks

from jmoe.moe.orders import step_tables
from jmoe.placement.tabulate import tabulate


def moved(rank_LN: Int[np.ndarray, "L N"], ranks: int, size: int) -> dict[str, float]:
    """Returns the shares of tokens that change devices.

    first: share into the first layer.
    between: mean share between two layers.
    home: share after the last layer.
    rows: sum of all these moves for each layer and token.
    """
    layers, tokens = rank_LN.shape
    home_1N = dealt_ranks(1, tokens, ranks, size)
    share = (np.diff(np.concatenate([home_1N, rank_LN, home_1N]), axis=0) != 0).mean(1)
    found = {"first": share[0], "between": share[1:-1].mean(), "home": share[-1]}
    found["rows"] = share.sum() / layers
    return {name: round(float(value), 5) for name, value in found.items()}


def measure(model: str, data: Path, train_windows: int, windows: int) -> dict[str, Any]:
    """Returns the ``moves`` part of the results: shares by devices and by tokens of a step."""
    start = time.perf_counter()
    train, valid = collect(model, data / "train", train_windows), collect(model, data / "valid", windows)
    profile, test = train.profile(train.domains), valid.test(valid.domains)
    found: dict[str, Any] = {}
    for ranks in RANKS:
        home_LE = homes(profile, ranks, "alternating")
        tables = step_tables(tabulate(profile, home_LE, ranks), history=False)
        found[str(ranks)] = {
            str(size): moved(shuffled_ranks(tables, test, home_LE, ranks, size), ranks, size)
            for size in SIZES
        }
        log(f"{ranks} devices, between layers", found[str(ranks)]["256"]["between"])
    return {"devices": found, "seconds": round(time.perf_counter() - start)}
