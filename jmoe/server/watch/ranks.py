"""Which rank holds which expert, and what each rank's experts got."""

from typing import Any

import numpy as np


def rank_of_expert(stats: dict[str, Any]) -> np.ndarray:
    """int ``[layers, experts]``: ``placement`` in the engine's statistics; where it is absent, experts lie in
    order and in even shares."""
    layers, experts = len(stats["model"]["moe_layers"]), stats["model"]["experts"]
    ranks = stats["mesh"]["expert"]
    if stats.get("placement") is not None:
        return np.asarray(stats["placement"], np.int64)
    return np.broadcast_to(np.arange(experts) * ranks // experts, (layers, experts))


def load_by_rank(counts_LE: np.ndarray, rank_LE: np.ndarray) -> np.ndarray:
    """int ``[layers, ranks]``: the assignments to each rank's experts."""
    layers, ranks = len(rank_LE), int(rank_LE.max(initial=0)) + 1
    places = np.arange(layers)[:, None] * ranks + rank_LE
    sums = np.bincount(places.ravel(), counts_LE.ravel(), layers * ranks)  # exact up to 2^53
    return sums.astype(np.int64).reshape(layers, ranks)
