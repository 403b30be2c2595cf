"""Progress on standard error: bars on a terminal, else nothing or a line at every tenth."""

import sys
from collections.abc import Callable
from typing import Self

from tqdm import tqdm

UNITS = {
    "kernels": ("build", False),
    "load": ("B", True),
    "compile": ("shape", False),
    "score": ("token", True),
    "profile": ("token", True),
    "place": ("step", False),
    "bench": ("round", False),
}


# (stage, done, total); the total is None if it is not known
Progress = Callable[[str, int, int | None], None]


def silent(stage: str, done: int, total: int | None) -> None:
    """Shows nothing; it is a ``Progress``."""


def counter(progress: Progress, stage: str) -> Callable[[int], None]:
    """Returns a callback that adds to a stage without a known total."""
    done = 0

    def add(amount: int) -> None:
        nonlocal done
        done += amount
        progress(stage, done, None)

    return add


class Bars:
    """Bars, one per stage; they are called with (stage, done, total). The bars are closed at the end of the
    ``with``."""

    def __init__(self) -> None:
        self._bars: dict[str, tqdm] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for bar in self._bars.values():
            bar.close()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        if stage not in self._bars:
            unit, scale = UNITS[stage]
            self._bars[stage] = tqdm(
                desc=stage,
                total=total,
                unit=unit,
                unit_scale=scale,
                leave=False,
                disable=not sys.stderr.isatty(),
            )
        bar = self._bars[stage]
        bar.update(done - bar.n)


class Tenths:
    """Prints a line at every tenth, for logs; it is called with (done, total).

    unit_name: what is counted.
    """

    def __init__(self, unit_name: str) -> None:
        self.unit_name, self.tenth = unit_name, 0

    def __call__(self, done: int, total: int) -> None:
        if (tenth := 10 * done // total) > self.tenth:
            self.tenth = tenth
            line = f"{done} of {total} {self.unit_name} ({100 * done // total} %)"
            print(line, file=sys.stderr, flush=True)
