"""The values that the host and the jitted parts of a step that it drives pass to each other."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from jmoe.moe.types import Changes, Counts, DispatchStats, Routing
from jmoe.offload.types import Forecast


class Rows(NamedTuple):
    """Rows between two layers. x_ND: rows after the last layer's attention; y_ND: outputs of its experts,
    still to be added."""

    x_ND: Array
    y_ND: Array


class Work(NamedTuple):
    """The input of a layer's experts: normed rows, expert ids (E for none) and combine weights."""

    x_TD: Array
    ids_TK: Array
    weights_TK: Array


class Seen(NamedTuple):
    """What a layer keeps for the end of the step.

    plain: the router's own choice; None in a decode step, where the predictor has seen it already.
    stats: statistics of the layer's dispatch.
    changes: what lossy techniques did to each token.
    computed: number of assignments that its experts computed; None before they ran.
    """

    plain: Routing | None
    stats: DispatchStats
    changes: Changes | None
    computed: Array | None = None

    def done(self, cache: Counts) -> DispatchStats:
        """The layer's statistics, with the counts of the cache for it."""
        assert self.computed is not None, "the layer's experts did not run"
        traffic = replace(self.stats.traffic, computed=self.computed)
        return replace(self.stats, traffic=traffic, counts=self.stats.counts | cache)


class Attended(NamedTuple):
    """A layer before its experts run.

    x_ND: rows after attention and the shared expert.
    work: input of the experts.
    seen: what the layer keeps for the end of the step.
    walk: the predictor's state in this step.
    told_RE: array for the host, made by ``tell``: which experts are needed; then, if experts are predicted,
        each expert's highest gate score, and p and wanted of the layers ahead.
    """

    x_ND: Array
    work: Work
    seen: Seen
    walk: Any
    told_RE: Array


def tell(*parts: Array) -> Array:
    """Stacks rows ``[E]`` and ``[A, E]`` into ``[R, E]`` float32, one array for the host to wait for."""
    rows = [part if part.ndim == 2 else part[None] for part in parts]
    return jnp.concatenate([each.astype(jnp.float32) for each in rows])


def forecast_of(rows_RE: np.ndarray) -> Forecast:
    """The forecast on the host, from the 2 * A rows of ``tell``'s array that hold it."""
    p_AE, wanted_AE = np.split(rows_RE, 2)
    return Forecast(p_AE, wanted_AE > 0)  # pyright: ignore[reportArgumentType]
