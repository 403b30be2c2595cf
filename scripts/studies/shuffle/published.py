"""Measures local activations by published routing: OLMoE on 8 devices and Mixtral on 4, at three layers.

The tables say how often a token id chose each expert. So the rates are those of independent tokens of the
tested text, exact in expectation, without history and without requests. In-domain, the counts themselves are
divided at random: each assignment goes to the statistics or to the test, so the test has no unseen text.
"""

import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from shared.published_routing import MODELS, SLOTS, files_by_domain, read_rows
from shared.results import few
from studies.shuffle.grouping import mean

from jmoe.moe.orders import align
from jmoe.placement.baselines import load, random
from jmoe.placement.coclustering import alternating
from jmoe.placement.objective import TOKENS, LayerProblem, Problem
from jmoe.placement.tabulate import PRIOR

RANKS = {"olmoe": 8, "mixtral": 4}
METHODS = {"alternating": alternating, "load": load, "random": random}
SEEDS = 5
SIZE, STEPS = 256, 64
REQUESTS, LENGTH = 32, 1024  # drawn requests and their tokens, because none were published


def read(path: Path, experts: int) -> Int[np.ndarray, "L V E"]:
    """Returns the counts of one model and domain."""
    rows = read_rows(path)
    counts = np.zeros((len(SLOTS), rows[:, 2].max() + 1, experts), np.int64)
    np.add.at(counts, (rows[:, 0], rows[:, 2], rows[:, 1]), rows[:, 3])
    return counts


def problem_of(counts_LVE: np.ndarray, ranks: int, rng: np.random.Generator) -> Problem:
    """Returns the placement problem, as if each token id chose its experts independently of each other."""
    often_V = counts_LVE[0].sum(1)
    requests_QV = rng.multinomial(LENGTH, often_V / often_V.sum(), REQUESTS).astype(np.float32)
    top = np.sort(np.argsort(-often_V, kind="stable")[: min(TOKENS, np.count_nonzero(often_V))])
    layers, together, requests = [], [], []
    for counts_VE in counts_LVE:
        chance_VE = counts_VE / np.maximum(counts_VE.sum(1, keepdims=True), 1)
        requests_QE = (requests_QV @ chance_VE).astype(np.float32)
        loads_EG = [counts_VE.sum(0)[:, None], requests_QE.T]
        load_EG = 0.5 * np.column_stack([a / a.sum() for a in loads_EG])
        part_TE = counts_VE[top]
        chosen_ET = np.ascontiguousarray((part_TE / part_TE.sum()).T, np.float32)
        weight_T = (often_V[top] / often_V[top].sum()).astype(np.float32)
        layers.append(LayerProblem(chosen_ET, weight_T, load_EG.astype(np.float32), ranks))
        both_EE = chance_VE.T @ counts_VE
        np.fill_diagonal(both_EE, counts_VE.sum(0))
        together.append(both_EE.astype(np.float32))
        requests.append(requests_QE)
    nothing = np.zeros((len(layers) - 1, *together[0].shape), np.float32)
    return Problem(layers, np.stack(together), nothing, np.stack(requests, 1), ranks)


def rank_table(counts_VE: np.ndarray, home_E: np.ndarray, ranks: int, k: int) -> Float[np.ndarray, "V R"]:
    """Returns shares smoothed in the same way as in ``tabulate``. An unseen id has the average shares."""
    counts_VR = counts_VE @ np.eye(ranks)[home_E]
    average_R = counts_VR.sum(0) / counts_VR.sum()
    smoothed_VR = counts_VR + PRIOR * k * average_R
    return smoothed_VR / smoothed_VR.sum(1, keepdims=True)


@jax.jit
def _rows(share_STR: jax.Array) -> jax.Array:
    valid_T = jnp.ones(share_STR.shape[1], bool)
    return jax.lax.map(lambda share_TR: align(share_TR, valid_T).row_N, share_STR)


def rates(
    train_LVE: np.ndarray, test_LVE: np.ndarray, home_LE: np.ndarray, ranks: int, k: int, seed: int = 0
) -> dict[str, float]:
    """Returns the rates of drawn tokens.

    local: local share of tokens that the tables put on ranks.
    dealt: local share of tokens in batch order.
    peak: maximum of the load over its mean.
    unseen: share of tokens whose id is not in the statistics.
    """
    rng = np.random.default_rng(seed)
    often_V = test_LVE[0].sum(1)
    ids_N = rng.choice(len(often_V), STEPS * SIZE, p=often_V / often_V.sum())
    rows = []
    for seen_VE, test_VE, home_E in zip(train_LVE, test_LVE, home_LE, strict=True):
        guess_VR = np.rint(255 * rank_table(seen_VE, home_E, ranks, k)).astype(np.int32)
        truth_VR = test_VE @ np.eye(ranks)[home_E]
        share_NR = truth_VR[ids_N] / np.maximum(test_VE[ids_N].sum(1, keepdims=True), 1)
        row_N = np.asarray(_rows(guess_VR[ids_N].reshape(STEPS, SIZE, ranks))).ravel()
        dealt_N = np.tile(np.repeat(np.arange(ranks), SIZE // ranks), STEPS)
        n, loads_R = np.arange(len(ids_N)), truth_VR.sum(0)
        rows.append({
            "local": share_NR[n, row_N // (SIZE // ranks)].mean(),
            "dealt": share_NR[n, dealt_N].mean(),
            "peak": loads_R.max() / loads_R.mean(),
        })  # fmt: skip
    unseen = float((train_LVE[0].sum(1)[ids_N] == 0).mean())
    return mean(rows) | {"unseen": unseen}


def halves(counts: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    first = np.random.default_rng(seed).binomial(counts, 0.5)
    return first, counts - first


def measure(routing: Path, dry: bool = False) -> dict[str, Any]:
    """Returns the ``published`` part of the results: rates by model, method and "statistics>test"."""
    start, models = time.perf_counter(), {}
    for model, (_, experts, k) in [*MODELS.items()][few(dry)]:
        ranks = RANKS[model]
        files = [*files_by_domain(routing, model).items()][few(dry)]
        counts = {domain: read(path, experts) for domain, path in files}
        vocab = max(c.shape[1] for c in counts.values())
        counts = {d: np.pad(c, ((0, 0), (0, vocab - c.shape[1]), (0, 0))) for d, c in counts.items()}
        tested = {d: halves(c) for d, c in counts.items()}
        found: dict[str, Any] = {method: {} for method in METHODS}
        for domain in counts:
            problem = problem_of(tested[domain][0], ranks, np.random.default_rng(0))
            for method, solve in METHODS.items():
                seeds = range(SEEDS if method == "random" else 1)
                homes = [
                    solve(problem, np.random.default_rng(s), lambda done, total, cost: None) for s in seeds
                ]
                for other in counts:
                    each = [rates(tested[domain][0], tested[other][1], h, ranks, k) for h in homes]
                    found[method][f"{domain}>{other}"] = mean(each)
            print(f"{model}, {domain}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        models[model] = {"ranks": ranks, "k": k, "domains": list(counts), "methods": found}
    return {"size": SIZE, "models": models, "seconds": round(time.perf_counter() - start)}
