"""What passes between the host and the jitted parts of a step that it drives."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from jmoe.moe.types import Changes, Counts, DispatchStats, Routing
from jmoe.offload.types import Forecast


class Rows(NamedTuple):
    """Rows between two layers. x_ND: behind the attention of the last; y_ND: what its experts gave, to be
    added."""

    x_ND: Array
    y_ND: Array


class Work(NamedTuple):
    """What a layer's experts are given: normed rows, experts (E for none) and their weights."""

    x_TD: Array
    ids_TK: Array
    weights_TK: Array


class Seen(NamedTuple):
    """What a layer leaves for the end of the step. plain: the router's own choice, of a decode step None: the
    predictor has seen it. computed: assignments that its experts were given, once they were."""

    plain: Routing | None
    stats: DispatchStats
    changes: Changes | None
    computed: Array | None = None

    def done(self, cache: Counts) -> DispatchStats:
        """What the layer did, with what the cache did for it."""
        assert self.computed is not None, "the layer's experts did not run"
        traffic = replace(self.stats.traffic, computed=self.computed)
        return replace(self.stats, traffic=traffic, counts=self.stats.counts | cache)


class Attended(NamedTuple):
    """A layer before its experts. x_ND: the rows behind attention. walk: the predictor's. told_RE: for the
    host, by ``tell``: which experts are needed; then, where they are predicted, what the gate scored at most,
    p and wanted of the layers ahead."""

    x_ND: Array
    work: Work
    seen: Seen
    walk: Any
    told_RE: Array


def tell(*parts: Array) -> Array:
    """``[R, E]`` float32, one array for the host to wait for: rows ``[E]`` and ``[A, E]``, one below the
    other."""
    rows = [part if part.ndim == 2 else part[None] for part in parts]
    return jnp.concatenate([each.astype(jnp.float32) for each in rows])


def forecast_of(rows_RE: np.ndarray) -> Forecast:
    """On the host, from its 2 * A rows of what ``tell`` made."""
    p_AE, wanted_AE = np.split(rows_RE, 2)
    return Forecast(p_AE, wanted_AE > 0)  # pyright: ignore[reportArgumentType]
