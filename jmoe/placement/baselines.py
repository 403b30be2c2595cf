"""Baselines for the co-clustering methods: placements by order, chance, load or transitions.

``exflow``   Experts that follow one another are placed together (ExFlow, inter-layer affinity); its integer
             program is replaced by a greedy start and exchanges, forward and backward over the layers.
``moetuner`` Experts are split into balanced clusters, then clusters are assigned to ranks by layer
             transitions (MoETuner, two integer programs). Both are exact here: the first by enumeration, with
             the shared objective, so that on small cases it is the optimum for comparing the others; the
             second by the assignment method, layer by layer.

``cross_entropy`` samples placements, keeps the best tenth and samples more like them. This is Speculative
MoE's early version ("CEO", balanced token-expert co-clustering). Its text was not available, so this is the
standard method with the objective of ``objective``. Each layer has one matrix of probabilities [experts,
ranks]; the tokens need none, as their best ranks follow from the experts'. Samples are balanced: experts in
random order take the open rank with the highest log-probability plus Gumbel noise. Samples of a round are
compared at the prices of the best so far.
"""

import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from jmoe.placement.coclustering import assign
from jmoe.placement.objective import LayerProblem, Problem, SolverProgress, prices
from jmoe.placement.placement import balance

ENUMERATED = 20_000  # partitions of a layer's experts; 16 experts on 2 ranks have 6435, 12 on 4 15400
SWEEPS = 8
ROUNDS, SAMPLES = 40, 60
ELITE = 0.1
KEEP = 0.3  # weight of the last round's probabilities


def uniform(problem: Problem, rng: np.random.Generator, progress: SolverProgress) -> Int[np.ndarray, "L E"]:
    """Places experts on ranks in order."""
    home_E = np.arange(problem.experts) // (problem.experts // problem.ranks)
    return np.tile(home_E, (len(problem.layers), 1))


def random(problem: Problem, rng: np.random.Generator, progress: SolverProgress) -> Int[np.ndarray, "L E"]:
    return rng.permuted(uniform(problem, rng, progress), axis=1)


def load(problem: Problem, rng: np.random.Generator, progress: SolverProgress) -> Int[np.ndarray, "L E"]:
    """Places experts, heaviest first, on the lightest rank with room, as EPLB does, without replicas."""
    loads_LE = np.stack([layer.chosen_ET.sum(1) for layer in problem.layers])
    dealt = balance(loads_LE, slots=problem.experts, ranks=problem.ranks, model="")
    return np.argsort(dealt.experts_LP, axis=1) // (problem.experts // problem.ranks)


def exflow(problem: Problem, rng: np.random.Generator, progress: SolverProgress) -> Int[np.ndarray, "L E"]:
    """Maximises the number of transitions that stay on a rank."""
    home_LE = load(problem, rng, progress)
    layers = len(home_LE)
    order = [*range(1, layers), *range(layers - 2, -1, -1)] * SWEEPS
    cost_L = [s.cost(home_E).total for s, home_E in zip(problem.layers, home_LE, strict=True)]
    for done, layer in enumerate(order):
        pull_ER = _pull(problem, home_LE, layer)
        room = problem.experts // problem.ranks
        home_LE[layer] = assign(np.repeat(pull_ER, room, axis=1)) // room
        cost_L[layer] = problem.layers[layer].cost(home_LE[layer]).total
        progress(done + 1, len(order), float(np.mean(cost_L)))
    return home_LE


def moetuner(problem: Problem, rng: np.random.Generator, progress: SolverProgress) -> Int[np.ndarray, "L E"]:
    """Enumerates all partitions; raises ValueError if there are too many."""
    count = partitions(problem.experts, problem.ranks)
    if count > ENUMERATED:
        raise ValueError(
            f"method moetuner goes through every partition: {problem.experts} experts on {problem.ranks} "
            f"devices have {count:.3g}, the limit is {ENUMERATED}; take another method"
        )
    home, costs = [], []
    for layer, statistics in enumerate(problem.layers):
        splits = balanced_splits(problem.experts, problem.ranks)
        home.append(min(splits, key=lambda home_E: statistics.cost(home_E).total))
        costs.append(statistics.cost(home[-1]).total)
        progress(layer + 1, len(problem.layers), float(np.mean(costs)))
    home_LE = np.stack(home)
    for layer in range(1, len(home_LE)):
        group_ER = np.eye(problem.ranks)[home_LE[layer]]
        from_ER = np.eye(problem.ranks)[home_LE[layer - 1]]
        stay_RR = group_ER.T @ problem.following_LEE[layer - 1].T @ from_ER
        home_LE[layer] = assign(stay_RR)[home_LE[layer]]
    return home_LE


def partitions(experts: int, ranks: int) -> int:
    """Returns the number of ways to split the experts evenly; ranks are interchangeable."""
    size = experts // ranks
    return math.factorial(experts) // (math.factorial(size) ** ranks * math.factorial(ranks))


def balanced_splits(experts: int, ranks: int) -> Iterator[Int[np.ndarray, " E"]]:
    """Yields each even partition once: a new group is always the lowest-numbered empty one."""
    size, home_E = experts // ranks, np.zeros(experts, np.int64)

    def extend(expert: int, counts: list[int]) -> Iterator[np.ndarray]:
        if expert == experts:
            yield home_E.copy()
            return
        for rank, count in enumerate(counts):
            if count < size:
                home_E[expert] = rank
                counts[rank] += 1
                yield from extend(expert + 1, counts)
                counts[rank] -= 1
                if not count:
                    break

    yield from extend(0, [0] * ranks)


def _pull(problem: Problem, home_LE: np.ndarray, layer: int) -> Float[np.ndarray, "E R"]:
    """Returns how many of each expert's transitions to and from the neighbouring layers each rank would
    keep."""
    pull_ER = np.zeros((problem.experts, problem.ranks))
    if layer > 0:
        pull_ER += problem.following_LEE[layer - 1].T @ np.eye(problem.ranks)[home_LE[layer - 1]]
    if layer + 1 < len(home_LE):
        pull_ER += problem.following_LEE[layer] @ np.eye(problem.ranks)[home_LE[layer + 1]]
    return pull_ER


def cross_entropy(
    problem: Problem, rng: np.random.Generator, progress: SolverProgress
) -> Int[np.ndarray, "L E"]:
    """Chooses the rank of each layer's experts by sampling."""
    home, costs = [], []
    for layer, statistics in enumerate(problem.layers):
        home.append(_layer(statistics, problem.experts, rng))
        costs.append(statistics.cost(home[-1]).total)
        progress(layer + 1, len(problem.layers), float(np.mean(costs)))
    return np.stack(home)


def _layer(problem: LayerProblem, experts: int, rng: np.random.Generator) -> Int[np.ndarray, " E"]:
    chance_ER = np.full((experts, problem.ranks), 1 / problem.ranks)
    best_E = sample_balanced(chance_ER, rng)
    best = problem.cost(best_E).total
    for _ in range(ROUNDS):
        samples = [_like(best_E, sample_balanced(chance_ER, rng), problem.ranks) for _ in range(SAMPLES)]
        price_R = prices(problem.shares(best_E), problem.weight_T)
        costs = np.array([problem.cost(home_E, price_R).total for home_E in samples])
        order = np.argsort(costs, kind="stable")[: max(1, int(ELITE * SAMPLES))]
        cost = problem.cost(samples[order[0]]).total
        if cost < best:
            best, best_E = cost, samples[order[0]]
        elite_ER = np.mean([np.eye(problem.ranks)[samples[i]] for i in order], axis=0)
        chance_ER = KEEP * chance_ER + (1 - KEEP) * elite_ER
    return best_E


def sample_balanced(chance_ER: Float[np.ndarray, "E R"], rng: np.random.Generator) -> Int[np.ndarray, " E"]:
    """Samples a rank for each expert by the probabilities ``chance_ER``, with equally many on each rank."""
    experts, ranks = chance_ER.shape
    key_ER = np.log(chance_ER + 1e-9) + rng.gumbel(size=chance_ER.shape)
    home_E, room_R = np.empty(experts, np.int64), np.full(ranks, experts // ranks)
    for expert in rng.permutation(experts):
        home_E[expert] = rank = int(np.argmax(np.where(room_R > 0, key_ER[expert], -np.inf)))
        room_R[rank] -= 1
    return home_E


def _like(model_E: np.ndarray, home_E: np.ndarray, ranks: int) -> np.ndarray:
    """Returns the same groups, each numbered as ``model_E`` numbers most of its experts: ranks are
    interchangeable, and a mean over samples with other numbers would blur."""
    common_RR = np.zeros((ranks, ranks))
    np.add.at(common_RR, (home_E, model_E), 1)
    return assign(common_RR)[home_E]
