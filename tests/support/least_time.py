"""Limits on processor time that other work of the same process cannot break."""

import time
from collections.abc import Callable
from typing import TypeVar

TRIES = 5
T = TypeVar("T")


def within(seconds: float, work: Callable[[], T], what: object = "") -> T:
    """Returns the result of ``work``, from a try that takes less than ``seconds`` of processor time.

    Slow work is slow in each try; a garbage collection after earlier tests slows one try only.
    """
    took = []
    for _ in range(TRIES):
        start = time.process_time()
        result = work()
        took.append(time.process_time() - start)
        if took[-1] < seconds:
            return result
    raise AssertionError(f"it takes {took} seconds: {what}")
