"""Which rank holds which expert, and how many assignments each rank's experts received."""

from typing import Any

import numpy as np


def rank_of_expert(stats: dict[str, Any]) -> np.ndarray:
    """int ``[layers, experts]``: the rank of each expert, from ``placement`` in the engine's statistics. If
    that is absent, the ranks hold the experts in order and in equal shares."""
    layers, experts = len(stats["model"]["moe_layers"]), stats["model"]["experts"]
    ranks = stats["mesh"]["expert"]
    if stats.get("placement") is not None:
        return np.asarray(stats["placement"], np.int64)
    return np.broadcast_to(np.arange(experts) * ranks // experts, (layers, experts))


def load_by_rank(counts_LE: np.ndarray, rank_LE: np.ndarray) -> np.ndarray:
    """int ``[layers, ranks]``: the number of assignments to each rank's experts."""
    layers, ranks = len(rank_LE), int(rank_LE.max(initial=0)) + 1
    places = np.arange(layers)[:, None] * ranks + rank_LE
    sums = np.bincount(places.ravel(), counts_LE.ravel(), layers * ranks)  # exact up to 2^53
    return sums.astype(np.int64).reshape(layers, ranks)
