"""Expert grouping: a profile -> the placement that keeps activations on their token's rank, evenly loaded.

Source: Speculative MoE, offline model scheduling. The input is a ``jmoe.placement.profile.Profile``; the
output is a ``Placement`` with E / R experts per rank in every layer and the token tables
(``jmoe.placement.tabulate``). It is exact, as experts are only renumbered. Command:
``jmoe place PROFILE --devices N --out FILE``, then ``[moe.shuffle] placement``.

``alternating`` and ``cross_entropy`` are the paper's final and early solvers, the others are baselines; all
are judged by the cost of ``objective``.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from jmoe.placement.baselines import cross_entropy, exflow, load, moetuner, random, uniform
from jmoe.placement.coclustering import alternating
from jmoe.placement.methods import DEFAULT, MethodName
from jmoe.placement.objective import Problem, SolverProgress
from jmoe.placement.placement import Placement
from jmoe.placement.profile import Profile
from jmoe.placement.tabulate import tabulate

Solver = Callable[[Problem, np.random.Generator, SolverProgress], Int[np.ndarray, "L E"]]
METHODS: dict[MethodName, Solver] = {
    "alternating": alternating,
    "cross_entropy": cross_entropy,
    "exflow": exflow,
    "moetuner": moetuner,
    "load": load,
    "uniform": uniform,
    "random": random,
}
NEEDED = 16  # tokens per expert: with fewer, loads and affinities are noise


def group(
    profile: Profile,
    *,
    ranks: int,
    method: str = DEFAULT,
    seed: int = 0,
    progress: SolverProgress = lambda done, total, cost: None,
) -> Placement:
    """Places experts on ``ranks`` devices and makes the placement's tables; the result is the same for the
    same seed. Raises ValueError for an unknown method, ranks that do not divide the experts, and a profile of
    too few tokens.

    progress: see ``objective``.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; it can be one of {', '.join(METHODS)}")
    needed = NEEDED * profile.experts
    if profile.tokens < needed:
        raise ValueError(
            f"the profile counts {profile.tokens} tokens; {needed} are needed, {NEEDED} for each of "
            f"{profile.experts} experts"
        )
    home_LE = METHODS[method](Problem.from_profile(profile, ranks), np.random.default_rng(seed), progress)
    placement = make_placement(home_LE, ranks, profile.model)
    return Placement(placement.experts_LP, ranks, profile.model, tabulate(profile, home_LE, ranks))


def make_placement(home_LE: Int[np.ndarray, "L E"], ranks: int, model: str) -> Placement:
    """Makes the placement with each expert on its rank, in ascending order there. Raises ValueError if the
    ranks do not hold equally many experts."""
    counts_LR = np.stack([np.bincount(home_E, minlength=ranks) for home_E in home_LE])
    if (counts_LR != home_LE.shape[1] // ranks).any():
        raise ValueError("every rank must hold equally many experts")
    return Placement(np.argsort(home_LE, axis=1, kind="stable"), ranks, model)
