"""Counts since the start of what the engine delivers, cheap enough to update at every token.

The difference of two copies shows what happened between them.
"""

import copy
import math
from dataclasses import dataclass, field

import numpy as np

FIRST = 1e-5  # seconds: the first bucket's upper bound
A_DOUBLING = 8  # buckets: a percentile is right within 9 %
BUCKETS = 27 * A_DOUBLING  # up to 1300 s


@dataclass
class Seconds:
    """A histogram of times in buckets that grow by a constant factor."""

    counts: list[int] = field(default_factory=lambda: [0] * BUCKETS)

    def add(self, seconds: float) -> None:
        place = math.ceil(A_DOUBLING * math.log2(max(seconds, FIRST) / FIRST))
        self.counts[min(place, BUCKETS - 1)] += 1


def percentile(counts: np.ndarray, share: float) -> float | None:
    """The time that ``share`` of the counted times do not exceed, in seconds; None if nothing was counted."""
    total = int(counts.sum())
    if total == 0:
        return None
    place = int(np.searchsorted(np.cumsum(counts), share * total))
    return FIRST * 2 ** ((place - 0.5) / A_DOUBLING)  # the geometric middle of the bucket


@dataclass
class Totals:
    """Counts since the start, written by the engine's thread (``rejected`` by the event loop)."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    rejected: int = 0
    first_token: Seconds = field(default_factory=Seconds)
    between_tokens: Seconds = field(default_factory=Seconds)
    step: Seconds = field(default_factory=Seconds)

    def copy(self) -> "Totals":
        return copy.deepcopy(self)
