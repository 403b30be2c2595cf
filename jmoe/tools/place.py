"""``jmoe place``: makes the placement file of experts, with the tables of their tokens, from a profile."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from jmoe.placement.group import group
from jmoe.placement.npz import check_writable
from jmoe.placement.objective import Problem
from jmoe.placement.profile import Profile
from jmoe.tools.progress import Bars


def place(path: Path, devices: int, out: Path, method: str, seed: int, progress: Bars) -> dict[str, Any]:
    """Writes the placement and returns the report that ``--json`` prints. It raises ValueError for inputs
    that do not fit together.

    remote, max_over_mean_load: measures of the profile's own tokens, placed by their ids under equal chunks
        of a large batch; other text has more remote activations.
    trace: objective after every step of the solver; empty if it takes no steps.
    """
    start = time.perf_counter()
    check_writable(out)
    profile = Profile.load(path)
    trace: list[float] = []

    def step(done: int, total: int, cost: float) -> None:
        trace.append(cost)
        progress("place", done, total)

    placement = group(profile, ranks=devices, method=method, seed=seed, progress=step)
    placement.save(out)
    cost = Problem.from_profile(profile, devices).cost(placement.home_LE)
    load_LR = placement.rank_loads(profile.loads_LE.astype(np.float64))
    return {
        "path": str(out),
        "model": placement.model,
        "method": method,
        "devices": devices,
        "layers": placement.layers,
        "experts": placement.experts,
        "profile_tokens": profile.tokens,
        "cost": cost.total,
        "trace": trace,
        "remote": cost.remote,
        "max_over_mean_load": float((load_LR.max(1) / load_LR.mean(1)).mean()),
        "seconds": time.perf_counter() - start,
    }
