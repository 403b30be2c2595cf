"""Threads that read and quantise several tensors at once: numpy lets others run in its large operations."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

Item = TypeVar("Item")
MOST = 4  # threads: each needs memory for one tensor above the result


def usable_cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Workers:
    """A few threads; use it in a ``with`` statement, whose end waits for them."""

    def __init__(self, count: int | None = None):
        """Takes the number of threads; None is one for each usable core, at most ``MOST``."""
        self.count = min(usable_cores(), MOST) if count is None else count
        self._pool = ThreadPoolExecutor(self.count, "jmoe-reader")

    def each(self, function: Callable[[Item], object], items: Sequence[Item]) -> None:
        """Calls a function with every item, of which ``count`` are worked on at once, in any order.

        If calls raise errors, it raises that of the first such item, and leaves out the items that were not
        begun. The end of the ``with`` waits for those that were.
        """
        if len(items) == 1 or self.count == 1:
            for item in items:
                function(item)
            return
        for _ in self._pool.map(function, items):  # it yields in the order of the items
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
