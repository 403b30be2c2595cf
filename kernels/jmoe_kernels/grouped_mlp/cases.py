"""Named patterns of group sizes that tests and benchmarks share."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Case:
    """A pattern of group sizes.

    name: what is special about the pattern.
    rows: number of physical rows, at least ``sum(sizes)``.
    sizes: number of rows of each expert.
    model: model dimension.
    inner: inner dimension.
    """

    name: str
    rows: int
    sizes: tuple[int, ...]
    model: int = 32
    inner: int = 16


CASES = (
    Case("even", 64, (16, 16, 16, 16)),
    Case("one row each", 4, (1, 1, 1, 1)),
    Case("all rows in the first", 70, (70, 0, 0, 0)),
    Case("all rows in the last", 70, (0, 0, 0, 70)),
    Case("no rows at all", 8, (0, 0, 0, 0)),
    Case("rows past the last group", 40, (3, 0, 17, 5)),
    Case("groups end on tile edges", 112, (16, 32, 64, 0)),
    Case("groups end one past tile edges", 116, (17, 33, 65, 1)),
    Case("one expert", 33, (33,)),
    Case("odd dimensions", 29, (5, 0, 11, 2, 9), model=20, inner=12),
    Case("prefill tiles", 300, (100, 1, 199)),
)


def empty_patterns(experts: int, rows_each: int) -> Iterator[tuple[int, ...]]:
    """Yields group sizes for every subset of experts that has rows: 2^experts patterns."""
    for bits in range(2**experts):
        yield tuple(rows_each + e if bits >> e & 1 else 0 for e in range(experts))


def make_inputs(case: Case, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns (x, gate_up, down, group sizes) as float32 and int32 arrays."""
    rng = np.random.default_rng(seed)
    experts = len(case.sizes)
    return (
        rng.standard_normal((case.rows, case.model), np.float32),
        rng.standard_normal((experts, 2, case.inner, case.model), np.float32) * case.model**-0.5,
        rng.standard_normal((experts, case.model, case.inner), np.float32) * case.inner**-0.5,
        np.asarray(case.sizes, np.int32),
    )
