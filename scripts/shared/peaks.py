"""Computes the peaks of a MoE layer's load.

A peak is the greatest load over the even share. The even share is N = tokens x k / experts (the paper's) for
an expert, and tokens x k / ranks for a device. It is the share of plain top-k: dropping does not lower it, so
that peaks before and after compare as times do.
"""

import numpy as np

from jmoe.placement.placement import balance

RANKS = 8


def expert_peak(counts_E: np.ndarray, num_plain: float) -> float:
    """Returns the most loaded expert's assignments over the even share of ``num_plain`` assignments."""
    return float(counts_E.max() * counts_E.size / num_plain)


def device_peak(loads_R: np.ndarray, num_plain: float) -> float:
    """Returns the most loaded rank's assignments over the even share of ``num_plain`` assignments."""
    return float(loads_R.max() * loads_R.size / num_plain)


def rank_loads(counts_E: np.ndarray, ranks: int = RANKS) -> np.ndarray:
    """Returns the load of each rank, with the experts in order over the ranks."""
    return counts_E.reshape(ranks, -1).sum(1)


def eplb_peak(counts_E: np.ndarray, history_E: np.ndarray, extra: int, ranks: int = RANKS) -> float:
    """Returns the device peak of ``counts_E`` under the placement that is balanced for ``history_E``.

    extra: the number of redundant slots of that placement.
    """
    slots = counts_E.size + extra
    placement = balance(history_E[None], slots=slots, ranks=ranks, model="bench")
    return device_peak(placement.rank_loads(counts_E[None].astype(float))[0], counts_E.sum())
