"""The capacity stage restated: one walk over all candidates in order of preference, in plain Python."""

import math
from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from jmoe.config.techniques import CapacityConfig


@dataclass
class Shard:
    """One shard's routing and token flags, in numpy.

    ids: experts of each token.
    weights: weights of these experts.
    scores: scores of all experts.
    valid: mask of the tokens that are not padding.
    exact: mask of the tokens that opted out.
    priority: priority of each token.
    local: first expert of the shard and its number of experts.
    """

    ids: np.ndarray
    weights: np.ndarray
    scores: np.ndarray
    valid: np.ndarray
    exact: np.ndarray
    priority: np.ndarray | None
    local: tuple[int, int]

    def rows(self, chosen) -> "Shard":
        """Returns the shard with only the chosen tokens, in the order of ``chosen``."""
        arrays = {name: a[chosen] for name, a in vars(self).items() if isinstance(a, np.ndarray)}
        return replace(self, **arrays)


def places(factor: float | Fraction, tokens: int, k: int, experts: int) -> int:
    return min(tokens, max(1, math.ceil(Fraction(factor) * tokens * k / experts)))


def limit(shard: Shard, cfg: CapacityConfig, factor: float, draws: np.ndarray):
    """Returns ids, weights and the five counts as lists with an entry for each token.

    draws: random numbers by (place, column).
    """
    tokens, k = shard.ids.shape
    experts = shard.scores.shape[1]
    capped = [t for t in range(tokens) if shard.valid[t] and not shard.exact[t]]
    place = np.cumsum(shard.valid) - 1
    scale = [scale_of(shard, t) for t in range(tokens)]
    extra = shard.local[1] if cfg.policy == "expand" else 0
    ids = np.concatenate([shard.ids, np.full((tokens, extra), experts)], axis=1)
    weights = np.concatenate([shard.weights, np.zeros((tokens, extra))], axis=1).astype(np.float32)
    asked = {(t, j) for t in capped for j in range(k) if ids[t, j] < experts}
    for t in capped if extra else ():
        for i, e in enumerate(range(shard.local[0], sum(shard.local))):
            if e not in shard.ids[t] and shard.scores[t, e] * scale[t] > 0:
                ids[t, k + i], weights[t, k + i] = e, shard.scores[t, e] * scale[t]

    def preference(t: int, j: int, weight: float):
        by = {"score": -weight, "order": t, "reverse_order": -t, "random": draws[place[t], j]}[cfg.metric]
        return (0 if shard.priority is None else -shard.priority[t], by, t, j)

    width = shard.local[1] if cfg.scope == "device" else 1
    room = Counter(dict.fromkeys(range(experts), width * places(factor, int(shard.valid.sum()), k, experts)))

    def walk(offers: dict[tuple[int, int], tuple[int, float]]) -> set[tuple[int, int]]:
        taken = set()
        for t, j in sorted(offers, key=lambda at: preference(*at, offers[at][1])):
            group = offers[t, j][0] // width
            if room[group]:
                room[group] -= 1
                taken.add((t, j))
        return taken

    present = {(t, j) for t in capped for j in range(k + extra) if ids[t, j] < experts}
    if cfg.policy == "expert_drop":
        load = Counter(int(ids[at]) for at in asked)
        skipped = sorted(range(experts), key=lambda e: (load[e], e))[: max(1, experts // 10)]
        kept = {at for at in asked if ids[at] not in skipped}
    else:
        kept = walk({at: (int(ids[at]), weights[at]) for at in present})
    for at in present - kept:
        ids[at], weights[at] = experts, 0
    rerouted = set()
    tried = {t: set(shard.ids[t].tolist()) for t in capped}
    for _ in range(cfg.rounds if cfg.policy == "reroute" else 0):
        offers = {}
        for t in capped:
            best = sorted(range(experts), key=lambda e: (-shard.scores[t, e], e))
            free = [e for e in best if e not in tried[t] and room[e // width] and shard.scores[t, e] > 0]
            lost = [j for j in range(k) if (t, j) in asked - kept - rerouted]
            offers |= {(t, j): (e, shard.scores[t, e] * scale[t]) for j, e in zip(lost, free, strict=False)}
        for t, j in offers:
            tried[t].add(offers[t, j][0])
        for at in walk(offers):
            ids[at], weights[at] = offers[at]
            rerouted.add(at)
    if cfg.renormalize:
        for t in capped:
            if 0 < weights[t].sum() != shard.weights[t].sum():
                weights[t] *= shard.weights[t].sum() / weights[t].sum()

    def count(chosen: set[tuple[int, int]]) -> list[int]:
        return [sum(at[0] == t for at in chosen) for t in range(tokens)]

    opted = {(t, j) for t, j in np.ndindex(tokens, k) if shard.valid[t] and shard.exact[t]}
    return ids, weights, {
        "kept_T": count(asked & kept),
        "rerouted_T": count(rerouted),
        "dropped_T": count(asked - kept - rerouted),
        "extra_T": count(kept - asked),
        "exact_T": count({at for at in opted if shard.ids[at] < experts}),
    }  # fmt: skip


def scale_of(shard: Shard, t: int) -> np.float32:
    here = shard.ids[t] < shard.scores.shape[1]
    total = shard.scores[t][shard.ids[t][here]].sum(dtype=np.float32)
    return np.float32(shard.weights[t].sum() / total if total > 0 else 0)
