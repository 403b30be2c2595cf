"""Grouping by alternation: place experts for fixed clusters of requests, cluster requests for fixed experts.

This is Speculative MoE's solver, final version (Algorithm 1). From the paper:
* experts are visited by descending load; each goes to the open rank with the best alpha * affinity to the
  experts there + beta * affinity to the requests there - gamma * load there;
* then pairs are exchanged at random, and an exchange is kept if it gains;
* requests are visited by length; each goes to the open rank with the best affinity to the requests and
  experts there;
* the result is the best of ``STEPS``.

What the paper leaves open, decided here:
* the weights are all 1; each term is a share of the expert's (or request's) own activations;
* the affinity of an expert e, which is to be placed, to an expert f is the share of e's tokens that also
  chose f; that of an expert and a request is the share of the expert's choices that the request made;
* the first clusters come from balanced k-means on the requests' expert histograms, concatenated over the
  layers;
* requests are clustered once for all layers, since a request stays on its rank in all layers; experts are
  clustered in each layer;
* the gain of an exchange is by the objective of ``objective``, in which tokens go to the rank of their own
  experts: for shuffled tokens, clusters of requests are too coarse. These clusters give the starts, and at
  the end the ranks: which rank holds which group of a layer changes no token's cost, so groups go to the
  ranks whose requests want them most (exact assignment);
* the best is kept layer by layer, as the objective is a sum over layers;
* exchanges try all pairs in random order, ``PASSES`` times or until none gains.
"""

import numpy as np
from jaxtyping import Float, Int

from jmoe.placement.objective import Problem, SolverProgress, improve

STEPS = 6
PASSES = 20
CLUSTERINGS = 10  # rounds of k-means


def alternating(
    problem: Problem, rng: np.random.Generator, progress: SolverProgress
) -> Int[np.ndarray, "L E"]:
    """Chooses the rank of each layer's experts by alternation."""
    layers, steps = len(problem.layers), STEPS
    cluster_Q = cluster_requests(problem, rng)
    best_LE, best_L = np.zeros((layers, problem.experts), np.int64), np.full(layers, np.inf)
    for step in range(steps):
        home_LE = np.empty_like(best_LE)
        for layer, statistics in enumerate(problem.layers):
            home_LE[layer] = improve(statistics, place_experts(problem, layer, cluster_Q), rng, PASSES)
            cost = statistics.cost(home_LE[layer]).total
            if cost < best_L[layer]:
                best_L[layer], best_LE[layer] = cost, home_LE[layer]
            so_far = float(best_L[np.isfinite(best_L)].mean())
            progress(step * layers + layer + 1, steps * layers, so_far)
        cluster_Q = schedule_requests(problem, name_groups(problem, home_LE, cluster_Q), cluster_Q)
    return name_groups(problem, best_LE, cluster_Q)


def cluster_requests(problem: Problem, rng: np.random.Generator) -> Int[np.ndarray, " Q"]:
    """Clusters requests by balanced k-means on each request's share of choices by layer and expert."""
    want_QX = _choice_shares(problem)
    requests, ranks = len(want_QX), problem.ranks
    center_RX = want_QX[rng.choice(requests, ranks, replace=requests < ranks)]
    cluster_Q = np.zeros(requests, np.int64)
    for _ in range(CLUSTERINGS):
        cluster_Q = fill_evenly(want_QX @ center_RX.T - 0.5 * (center_RX**2).sum(1))
        center_RX = np.stack(
            [want_QX[cluster_Q == r].mean(0) if r in cluster_Q else center_RX[r] for r in range(ranks)]
        )
    return cluster_Q


def place_experts(problem: Problem, layer: int, cluster_Q: Int[np.ndarray, " Q"]) -> Int[np.ndarray, " E"]:
    """Places experts, by descending load, on the open rank that suits best."""
    statistics, requests_QE = problem.layers[layer], problem.requests_QLE[:, layer]
    load_E = statistics.chosen_ET.sum(1)
    size = problem.experts // problem.ranks
    by_request_RE = np.eye(problem.ranks)[cluster_Q].T @ requests_QE
    by_request_RE /= np.maximum(requests_QE.sum(0), 1e-9)
    together_EE = problem.together_LEE[layer] / np.maximum(
        np.diagonal(problem.together_LEE[layer])[:, None], 1
    )
    home_E = np.full(problem.experts, -1)
    load_R, by_expert_ER = np.zeros(problem.ranks), np.zeros((problem.experts, problem.ranks))
    for expert in np.argsort(-load_E, kind="stable"):
        score_R = by_expert_ER[expert] + by_request_RE[:, expert] - load_R
        score_R[np.bincount(home_E[home_E >= 0], minlength=problem.ranks) == size] = -np.inf
        home_E[expert] = rank = int(np.argmax(score_R))
        load_R[rank] += load_E[expert]
        by_expert_ER[:, rank] += together_EE[:, expert]
    return home_E


def schedule_requests(
    problem: Problem, home_LE: Int[np.ndarray, "L E"], cluster_Q: Int[np.ndarray, " Q"]
) -> Int[np.ndarray, " Q"]:
    """Assigns requests, longest first, to the open rank that suits best: most of their activations are local
    there, and the requests that ``cluster_Q`` assigns to it are similar."""
    home_RX = np.eye(problem.ranks)[home_LE.ravel()].T
    want_QX = _choice_shares(problem)
    unit_QX = want_QX / np.linalg.norm(want_QX, axis=1, keepdims=True)
    center_RX = np.eye(problem.ranks)[cluster_Q].T @ unit_QX
    center_RX /= np.maximum(np.linalg.norm(center_RX, axis=1, keepdims=True), 1e-9)
    return fill_evenly(want_QX @ home_RX.T + unit_QX @ center_RX.T, problem.requests_QLE.sum((1, 2)))


def name_groups(
    problem: Problem, home_LE: Int[np.ndarray, "L E"], cluster_Q: Int[np.ndarray, " Q"]
) -> Int[np.ndarray, "L E"]:
    """Returns the same groups, moved to the ranks whose requests choose them most."""
    rank_QR = np.eye(problem.ranks)[cluster_Q]
    named = []
    for layer, home_E in enumerate(home_LE):
        chosen_RE = rank_QR.T @ problem.requests_QLE[:, layer]
        named.append(assign((chosen_RE @ np.eye(problem.ranks)[home_E]).T)[home_E])
    return np.stack(named)


def fill_evenly(
    score_QR: Float[np.ndarray, "Q R"], priority_Q: Float[np.ndarray, " Q"] | None = None
) -> Int[np.ndarray, " Q"]:
    """Gives each row the open rank of its best score; a rank is full at ceil(Q / R) rows.

    priority_Q: rows with higher values choose first; by default those that lose most by their second choice.
    """
    requests, ranks = score_QR.shape
    if priority_Q is None:
        best = np.sort(score_QR, axis=1)
        priority_Q = best[:, -1] - best[:, -min(2, ranks)]
    room_R, rank_Q = np.full(ranks, -(-requests // ranks)), np.empty(requests, np.int64)
    for row in np.argsort(-priority_Q, kind="stable"):
        rank_Q[row] = rank = int(np.argmax(np.where(room_R > 0, score_QR[row], -np.inf)))
        room_R[rank] -= 1
    return rank_Q


def _choice_shares(problem: Problem) -> Float[np.ndarray, "Q X"]:
    """Returns each request's share of choices by layer and expert, all layers weighted alike; it sums to
    1."""
    share = problem.requests_QLE / np.maximum(problem.requests_QLE.sum((1, 2), keepdims=True), 1)
    return share.reshape(len(share), -1)


def assign(gain_NN: Float[np.ndarray, "N N"]) -> Int[np.ndarray, " N"]:
    """Returns the place of each row, every place used once, that maximises the sum of the gains ``gain_NN``.

    It uses shortest augmenting paths with potentials, O(N^3).
    """
    cost_NN = -np.asarray(gain_NN, np.float64)
    n = len(cost_NN)
    row_of = np.full(n + 1, -1)  # the last place is where each search starts
    row_price, place_price = np.zeros(n), np.zeros(n + 1)
    for row in range(n):
        row_of[n], at = row, n
        distance, before = np.full(n, np.inf), np.full(n, n)
        visited = np.zeros(n + 1, bool)
        while row_of[at] >= 0:
            visited[at] = True
            reached = cost_NN[row_of[at]] - row_price[row_of[at]] - place_price[:n]
            nearer = ~visited[:n] & (reached < distance)
            distance[nearer], before[nearer] = reached[nearer], at
            following = int(np.argmin(np.where(visited[:n], np.inf, distance)))
            step = distance[following]
            row_price[row_of[visited]] += step
            place_price[visited] -= step
            distance[~visited[:n]] -= step
            at = following
        while at != n:
            row_of[at] = row_of[before[at]]
            at = before[at]
    place = np.empty(n, np.int64)
    place[row_of[:n]] = np.arange(n)
    return place
