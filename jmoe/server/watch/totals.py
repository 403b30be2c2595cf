"""Counts since the start of what the engine delivers, cheap enough to update at every token.

The difference of two copies shows what happened between them: for the dashboard, and for the log's line about
the traffic.
"""

import asyncio
import copy
import logging
import math
from dataclasses import dataclass, field

import numpy as np

from jmoe.engine.reports import EngineSnapshot
from jmoe.server.engine_api import EngineProtocol

log = logging.getLogger(__name__)
EVERY = 10.0  # seconds between two lines about the traffic
FIRST = 1e-5  # seconds: the first bucket's upper bound
A_DOUBLING = 8  # buckets: a percentile is right within 9 %
BUCKETS = 27 * A_DOUBLING  # up to 1300 s


@dataclass
class TimeHistogram:
    """A histogram of times in buckets that grow by a constant factor."""

    counts: list[int] = field(default_factory=lambda: [0] * BUCKETS)

    def add(self, seconds: float) -> None:
        place = math.ceil(A_DOUBLING * math.log2(max(seconds, FIRST) / FIRST))
        self.counts[min(place, BUCKETS - 1)] += 1


def percentile(counts: np.ndarray, share: float) -> float | None:
    """Returns the time that ``share`` of the counted times do not exceed, in seconds; None if nothing was
    counted."""
    total = int(counts.sum())
    if total == 0:
        return None
    place = int(np.searchsorted(np.cumsum(counts), share * total))
    return FIRST * 2 ** ((place - 0.5) / A_DOUBLING)  # the geometric middle of the bucket


@dataclass
class Totals:
    """Counts since the start, written by the engine's thread (``rejected`` by the event loop).

    prompt_tokens: number of tokens of prompts.
    generation_tokens: number of tokens of answers.
    steps: number of steps.
    rejected: number of requests that got a 503.
    first_token: times to the first token.
    between_tokens: times between two tokens of an answer.
    step: times of a step.
    """

    prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    rejected: int = 0
    first_token: TimeHistogram = field(default_factory=TimeHistogram)
    between_tokens: TimeHistogram = field(default_factory=TimeHistogram)
    step: TimeHistogram = field(default_factory=TimeHistogram)

    def copy(self) -> "Totals":
        return copy.deepcopy(self)


async def log_traffic(engine: EngineProtocol, totals: Totals, every: float = EVERY) -> None:
    """Logs the traffic until cancelled. It never waits for the engine."""
    before = _counts(engine.snapshot(), totals)
    while True:
        await asyncio.sleep(every)
        snapshot = engine.snapshot()
        now = _counts(snapshot, totals)
        if now != before or snapshot.num_running or snapshot.num_waiting:
            prompt, generated, looked_up, found = (n - b for n, b in zip(now, before, strict=True))
            hits = f"{100 * found / looked_up:.1f} %" if looked_up else "-"
            speeds = f"prompt {prompt / every:.1f} tok/s, generation {generated / every:.1f} tok/s"
            requests = f"running {snapshot.num_running}, waiting {snapshot.num_waiting}"
            log.info("%s, %s, KV %.1f %%, prefix hits %s", speeds, requests, 100 * snapshot.kv_usage, hits)
        before = now


def _counts(snapshot: EngineSnapshot, totals: Totals) -> tuple[int, int, int, int]:
    return totals.prompt_tokens, totals.generation_tokens, snapshot.prefix_queries, snapshot.prefix_hits
