"""Grouping by the cross-entropy method: sample placements, keep the best tenth, sample more like them.

This is Speculative MoE's early version ("CEO", balanced token-expert co-clustering). Its text was not
available, so this is the standard method with the objective of ``objective``. Each layer has one matrix of
probabilities [experts, ranks]; the tokens need no matrix, as their best ranks follow from the experts'.
Samples are balanced: experts in random order take the open rank with the highest log-probability plus Gumbel
noise. Samples of a round are compared at the prices of the best so far.
"""

import numpy as np
from jaxtyping import Float, Int

from jmoe.placement.assignment import assign
from jmoe.placement.objective import LayerProblem, Problem, Progress, prices

ROUNDS, SAMPLES = 40, 60
ELITE = 0.1
KEEP = 0.3  # weight of the last round's probabilities


def cross_entropy(problem: Problem, rng: np.random.Generator, progress: Progress) -> Int[np.ndarray, "L E"]:
    """The rank of each layer's experts."""
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
    """The same groups, each numbered as ``model_E`` numbers most of its experts: ranks are interchangeable,
    and a mean over samples with other numbers would blur."""
    common_RR = np.zeros((ranks, ranks))
    np.add.at(common_RR, (home_E, model_E), 1)
    return assign(common_RR)[home_E]
