"""Binning as its rule is stated in words: one token, one expert at a time, without jax.

A token's vote for one of its k experts lies in bin b if ``b * width <= best - logit < (b + 1) * width``,
where ``best`` is the logit of its best choice; the last of six bins has no end. Exact tokens do not vote, and
their experts always stay.
"""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
from jmoe_kernels.binning import Rule

BINS = 6


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def choose(scores: np.ndarray, k: int) -> list[int]:
    """Returns the ids of the ``k`` best experts; ties go to the lower id."""
    return sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:k]


def bin_of(rule: Rule, rank: int, best: np.float32, logit: np.float32) -> int:
    if rule.method == "popularity":
        return 0
    if rule.method == "oea":
        return int(rank >= rule.k0)
    gap = best - logit
    return max(b for b in range(BINS) if b == 0 or gap >= np.float32(b) * np.float32(rule.bin_width))


def active_set(ballots: list[list[tuple[int, int]]], exact: set[int], experts: int, rule: Rule) -> set[int]:
    """Returns the experts that stay.

    ballots: (expert, bin) pairs of each lossy token.
    exact: experts of the exact tokens.
    """
    votes = Counter(pair for ballot in ballots for pair in ballot)
    union = {e for e, _ in votes}
    ranked = sorted(range(experts), key=lambda e: ([-votes[e, b] for b in range(BINS)], e))
    least, stay = rule.k, set()
    if rule.method in ("affinity", "oea"):
        stay = {e for e in union if votes[e, 0]}
    if rule.method == "affinity":
        stay |= {e for e in union if votes[e, 1] == len(ballots)}
    if rule.method in ("budget", "popularity"):
        least = max(rule.k, math.ceil(Fraction(str(rule.keep)) * len(union)))
    return stay | (set(ranked[:least]) & union) | exact


def refill(ids: list[int], logits: np.ndarray, active: set[int]) -> list[int]:
    """Replaces choices that are not active, in place, by the best-scored active experts not yet chosen."""
    free = iter(sorted(active - set(ids), key=lambda e: (-logits[e], e)))
    return [e if e in active else next(free) for e in ids]


def bin_experts(
    logits_TE: np.ndarray, valid_T: np.ndarray, lossy_T: np.ndarray, rule: Rule, *, renormalize: bool
) -> dict[str, np.ndarray]:
    """Returns the fields of ``Binned`` by name."""
    t, experts = logits_TE.shape
    scores = [softmax(row) for row in logits_TE]
    plain = [choose(row, rule.k) for row in scores]
    ballots, exact = [], set()
    for ids, logits, valid, lossy in zip(plain, logits_TE, valid_T, lossy_T, strict=True):
        best = max(logits[e] for e in ids)
        if valid and lossy:
            ballots.append([(e, bin_of(rule, rank, best, logits[e])) for rank, e in enumerate(ids)])
        elif valid:
            exact |= set(ids)
    active = active_set(ballots, exact, experts, rule)

    plain_weights, new, new_weights = [], [], []
    for ids, score, logits, lossy in zip(plain, scores, logits_TE, lossy_T, strict=True):
        weights = score[ids] / (score[ids].sum() if renormalize else 1)
        moved = refill(ids, logits, active) if lossy else ids
        plain_weights.append(weights)
        new.append(moved)
        if moved != ids:
            part = score[moved]
            share = part / part.sum() if part.sum() > 0 else np.full(rule.k, 1 / rule.k)
            weights = share * weights.sum()
        new_weights.append(weights)

    keys = [e if valid_T[i] else experts for i in range(t) for e in new[i]]
    return {
        "plain_ids_TK": np.array(plain),
        "plain_weights_TK": np.array(plain_weights),
        "ids_TK": np.array(new),
        "weights_TK": np.array(new_weights),
        "scores_TE": np.array(scores),
        "active_E": np.array([e in active for e in range(experts)]),
        "order_N": np.array(sorted(range(len(keys)), key=lambda i: (keys[i], i))),
        "group_sizes_E": np.array([keys.count(e) for e in range(experts)]),
    }
