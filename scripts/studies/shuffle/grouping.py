"""Measures local activations of every grouping method on held-out text, in-domain and across domains.

The statistics are from the train split, the rates from the valid split. Across domains, each domain in turn
is tested alone, with the statistics of all others.
"""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from shared.results import few
from shared.text_routing import RoutingSource, Test, collect
from studies.shuffle.placed_tokens import figures

from jmoe.placement.group import METHODS
from jmoe.placement.methods import MethodName
from jmoe.placement.objective import Problem
from jmoe.placement.profile import Profile

RANKS = (4, 8, 16)
MAIN = 8
SIZES = (64, 256)
SHOWN = ("alternating", "cross_entropy", "exflow", "load", "uniform")
ACROSS = ("alternating", "exflow")  # the solver of cross_entropy takes too long to run for every domain
SEEDS = 10
ACROSS_SEEDS = 3


def homes(profile: Profile, ranks: int, method: MethodName, seed: int = 0) -> np.ndarray:
    problem = Problem.from_profile(profile, ranks)
    return METHODS[method](problem, np.random.default_rng(seed), lambda done, total, cost: None)


def mean(rows: list[Any]) -> Any:
    """Returns the mean of equal structures, number by number, to 5 digits."""
    if isinstance(rows[0], dict):
        return {key: mean([row[key] for row in rows]) for key in rows[0]}
    return round(float(np.mean(rows)), 5)


def in_domain(train: RoutingSource, valid: RoutingSource, ranks: int, dry: bool = False) -> dict[str, Any]:
    """Returns the figures by method, and the share of unseen ids."""
    domains = list(valid.domains)[few(dry)]
    profile, test = train.profile(train.domains), valid.test(domains)
    singles = [valid.test([domain]) for domain in domains]
    found = {}
    for method in (*SHOWN, "random"):
        seeds = range(SEEDS if method == "random" and not dry else 1)
        start = time.perf_counter()
        placed = [homes(profile, ranks, method, seed) for seed in seeds]
        seconds = (time.perf_counter() - start) / len(placed)
        history = method == "alternating"
        rows = [figures(profile, home_LE, ranks, test, singles, SIZES, history) for home_LE in placed]
        found[method] = mean(rows) | {"solver_seconds": round(seconds, 1)}
        log(f"{ranks} devices, {method}", found[method]["steps"]["256"]["tables"]["local"])
    return found | {"unseen": round(test.unseen(profile), 5)}


def across(train: RoutingSource, valid: RoutingSource, ranks: int, dry: bool = False) -> dict[str, Any]:
    """Returns by domain that was left out its share of unseen ids, and its figures by method."""
    found = {}
    for domain in list(valid.domains)[few(dry)]:
        profile, test = train.profile(d for d in train.domains if d != domain), valid.test([domain])
        found[domain] = {"unseen": round(test.unseen(profile), 5)}
        for method in (*ACROSS, "random"):
            seeds = range(ACROSS_SEEDS if method == "random" and not dry else 1)
            placed = [homes(profile, ranks, method, seed) for seed in seeds]
            rows = [_row(profile, home_LE, ranks, test, method == "alternating") for home_LE in placed]
            found[domain][method] = mean(rows)
        log(f"without {domain}", found[domain]["alternating"]["steps"]["256"]["tables"]["local"])
    return found


def _row(profile: Profile, home_LE: np.ndarray, ranks: int, test: Test, history: bool) -> dict[str, Any]:
    return figures(profile, home_LE, ranks, test, [test], SIZES[1:], history)


def measure(model: str, data: Path, train_windows: int, windows: int, dry: bool = False) -> dict[str, Any]:
    """Returns the ``grouping`` part of the results."""
    start = time.perf_counter()
    train, valid = collect(model, data / "train", train_windows), collect(model, data / "valid", windows)
    log("routing", time.perf_counter() - start)
    tokens = {
        name: sum(len(r.tokens_N) for rows in source.domains.values() for r in rows)
        for name, source in (("train", train), ("valid", valid))
    }
    inside = {str(ranks): in_domain(train, valid, ranks, dry) for ranks in RANKS[few(dry)]}
    left_out = across(train, valid, MAIN, dry)
    return {
        "model": model,
        "sizes": train.sizes,
        "width": train.embeddings_VD.shape[1],
        "domains": list(valid.domains),
        "tokens": tokens,
        "random_seeds": [SEEDS, ACROSS_SEEDS],
        "in_domain": inside,
        "across": left_out,
        "seconds": round(time.perf_counter() - start),
    }


def log(name: str, value: float) -> None:
    print(f"{name}: {value:.4f}", file=sys.stderr, flush=True)
