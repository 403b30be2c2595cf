"""The objective of all grouping methods: expected remote activations and uneven load, of one layer or of all.

Speculative MoE, co-clustering objective: theta * imbalance + (1 - theta) * remote, with each expert in one
cluster and exactly E / R experts in each of R clusters. Both terms here are shares of all activations:

remote     Activations whose expert is not on the rank of their token. The paper's token clusters are
           minimised out: for fixed experts, token ids go to ranks by the linear program that keeps the most
           activations local under equal chunks (each rank gets 1/R of the occurrences, since a reduce-scatter
           takes only equal chunks; occurrences of one id may go to different ranks). Its dual has one price
           per rank.
imbalance  Sum over ranks of |experts' load - 1/R|: one half for all activations, one half the mean over
           requests, weighted by length. This is ours: the paper's term weighs tokens, which equal chunks
           already even out; a step is slow if the experts of one rank get more rows than those of others. A
           step often holds one request's tokens: without the second half, the experts of one kind of text are
           placed together, and a step of such text is less even than under a random placement.

Not in the paper and decided here: theta = 0.4 (on the bundled model single domains are then about as even as
under random placements; a lower theta trades that for local activations); only the ``TOKENS`` most frequent
ids are used, so that the solvers' time does not grow with the vocabulary.

Group-limited routing would add a constraint: its groups are contiguous expert ids, so renumbering would have
to move whole groups together, or the gate would have to choose groups before it renumbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jmoe.placement.profile import Profile

TOKENS = 4096
THETA = 0.4
STEPS = 60  # steps of the price search; with 4096 ids 2000 steps change the remote share by 0.0001
SolverProgress = Callable[[int, int, float], None]  # steps done, steps, mean cost of the layers placed so far


class Cost(NamedTuple):
    """Shares of activations; total is what is minimised."""

    total: float
    remote: float
    imbalance: float


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """One layer's statistics over T token ids, as shares of these ids' activations and occurrences.

    chosen_ET: activations of each expert and token id.
    weight_T: occurrences of each token id.
    load_EG: load of each expert in each of G groups of activations; each group is to be even over the ranks,
        and its sum over experts is its weight.
    ranks: number of ranks.
    theta: weight of the imbalance.
    """

    chosen_ET: Float[np.ndarray, "E T"]
    weight_T: Float[np.ndarray, " T"]
    load_EG: Float[np.ndarray, "E G"]
    ranks: int
    theta: float = THETA

    def shares(self, home_E: Int[np.ndarray, " E"]) -> Float[np.ndarray, "R T"]:
        """Returns each token id's activations on each rank."""
        return self._on_ranks(home_E) @ self.chosen_ET

    def excess(self, home_E: Int[np.ndarray, " E"]) -> Float[np.ndarray, "R G"]:
        """Returns the load of each rank in each group, minus its even share."""
        return self._on_ranks(home_E) @ self.load_EG - self.load_EG.sum(0) / self.ranks

    def cost(self, home_E: Int[np.ndarray, " E"], price_R: Float[np.ndarray, " R"] | None = None) -> Cost:
        """Returns the cost at the best prices; at prices passed in it is cheaper to compute and never
        higher."""
        share_RT = self.shares(home_E)
        price_R = prices(share_RT, self.weight_T) if price_R is None else price_R
        # an upper bound, at any prices, of what stays local under equal chunks; exact at the best prices
        local = float((share_RT - price_R[:, None] * self.weight_T).max(0).sum() + price_R.mean())
        uneven = float(np.abs(self.excess(home_E)).sum())
        return Cost(self.theta * uneven + (1 - self.theta) * (1 - local), 1 - local, uneven)

    def _on_ranks(self, home_E: Int[np.ndarray, " E"]) -> Float[np.ndarray, "R E"]:
        return np.eye(self.ranks, dtype=np.float32)[:, home_E]


@dataclass(frozen=True, eq=False)
class Problem:
    """A profile as the solvers use it.

    layers: statistics of each layer.
    together_LEE, following_LEE, requests_QLE: profile's counts, float32.
    ranks: number of ranks.
    """

    layers: list[LayerProblem]
    together_LEE: Float[np.ndarray, "L E E"]
    following_LEE: Float[np.ndarray, "L-1 E E"]
    requests_QLE: Float[np.ndarray, "Q L E"]
    ranks: int

    @classmethod
    def from_profile(cls, profile: Profile, ranks: int, theta: float = THETA) -> "Problem":
        """Makes the problem of a profile. Raises a ValueError that names the divisors if ``ranks`` does not
        divide the number of experts."""
        experts, often_V = profile.experts, profile.frequency_V
        if ranks < 1 or experts % ranks:
            divisors = [d for d in range(1, experts + 1) if experts % d == 0]
            raise ValueError(f"{ranks} devices do not divide {experts} experts; it can be one of {divisors}")
        ids_T = np.sort(np.argsort(-often_V, kind="stable")[: min(TOKENS, np.count_nonzero(often_V))])
        weight_T = _shares(often_V[ids_T])
        requests_QLE = profile.sample.experts_QLE.astype(np.float32)
        layers = []
        for layer, load_E in enumerate(profile.loads_LE):
            load_EG = 0.5 * np.column_stack([_shares(load_E), _shares(requests_QLE[:, layer].T)])
            chosen_ET = _shares(profile.chosen(layer, ids_T).T)
            layers.append(LayerProblem(chosen_ET, weight_T, load_EG, ranks, theta))
        together_LEE, following_LEE = (
            a.astype(np.float32) for a in (profile.together_LEE, profile.following_LEE)
        )
        return cls(layers, together_LEE, following_LEE, requests_QLE, ranks)

    @property
    def experts(self) -> int:
        return self.requests_QLE.shape[2]

    def cost(self, home_LE: Int[np.ndarray, "L E"]) -> Cost:
        """Returns the mean cost over layers."""
        each = [layer.cost(home_E) for layer, home_E in zip(self.layers, home_LE, strict=True)]
        return Cost(*np.mean(each, axis=0).tolist())


def _shares(counts: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(counts / counts.sum(), np.float32)


def prices(share_RT: Float[np.ndarray, "R T"], weight_T: Float[np.ndarray, " T"]) -> Float[np.ndarray, " R"]:
    """Returns the price of a place on each rank if every rank is to get equally many tokens, near the
    optimum.

    It solves the dual of the linear program by subgradient steps: the price of an overfull rank rises. The
    unit is the share of its activations that a token must gain there.
    """
    ranks = len(share_RT)
    price_R = np.zeros(ranks, np.float32)
    best, best_R = np.inf, price_R
    for step in range(STEPS):
        value_RT = share_RT - price_R[:, None] * weight_T
        value = float(value_RT.max(0).sum() + price_R.mean())
        if value < best:
            best, best_R = value, price_R
        taken_R = np.bincount(value_RT.argmax(0), weight_T, ranks)
        price_R = (price_R + (taken_R - 1 / ranks) * (0.5 / (1 + 0.2 * step))).astype(np.float32)
    return best_R


class Swapper:
    """Exchanges pairs of one layer's experts; ``home_E``, the rank of each expert, is the state.

    The prices are those of the last ``reprice``.
    """

    def __init__(self, problem: LayerProblem, home_E: Int[np.ndarray, " E"]):
        self.problem, self.home_E = problem, home_E.copy()
        self.reprice()

    def reprice(self) -> None:
        share_RT, weight_T = self.problem.shares(self.home_E), self.problem.weight_T
        self._value_RT = share_RT - prices(share_RT, weight_T)[:, None] * weight_T
        self._local_share = float(self._value_RT.max(0).sum())
        self._excess_RG = self.problem.excess(self.home_E)

    def swap(self, first: int, second: int) -> bool:
        """Exchanges two experts if that lowers the cost at these prices; returns whether it did."""
        both = [self.home_E[first], self.home_E[second]]
        if both[0] == both[1]:
            return False
        problem, sign = self.problem, np.array([[1], [-1]], np.float32)
        before_2T = self._value_RT[both]
        self._value_RT[both] += sign * (problem.chosen_ET[second] - problem.chosen_ET[first])
        local = float(self._value_RT.max(0).sum())
        before_2G = self._excess_RG[both]
        after_2G = before_2G + sign * (problem.load_EG[second] - problem.load_EG[first])
        more_uneven = float(np.abs(after_2G).sum() - np.abs(before_2G).sum())
        if (1 - problem.theta) * (local - self._local_share) <= problem.theta * more_uneven + 1e-7:
            self._value_RT[both] = before_2T
            return False
        self._local_share, self._excess_RG[both] = local, after_2G
        self.home_E[first], self.home_E[second] = both[::-1]
        return True


def improve(
    problem: LayerProblem, home_E: Int[np.ndarray, " E"], rng: np.random.Generator, passes: int
) -> Int[np.ndarray, " E"]:
    """Returns ``home_E`` after at most ``passes`` passes over all pairs of experts in random order; exchanges
    that gain are kept.

    Prices are computed again before each pass; a pass that gains nothing is the last.
    """
    swapper, experts = Swapper(problem, home_E), len(home_E)
    pairs = np.stack(np.triu_indices(experts, 1), 1)
    for _ in range(passes):
        if not sum([swapper.swap(one, other) for one, other in rng.permutation(pairs)]):
            break
        swapper.reprice()
    return swapper.home_E
