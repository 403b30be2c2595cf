"""The values that the host and the jitted parts of a step that it drives pass to each other."""

from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from jmoe.engine.step.counters import MoETotals
from jmoe.models.journey import RouterAhead
from jmoe.moe.types import Changes, Counts, DispatchStats, Knobs, Routing
from jmoe.nn.rope import Rotations
from jmoe.nn.sequences import Sequences
from jmoe.offload.types import Forecast, Predictor, PredictorState


class LayerRows(NamedTuple):
    """Rows between two layers.

    x_ND: rows after the last layer's attention.
    y_ND: outputs of the last layer's experts, which are still to be added.
    """

    x_ND: Array
    y_ND: Array


class ExpertInput(NamedTuple):
    """The input of a layer's experts: normed rows, expert ids (E means none) and combine weights."""

    x_TD: Array
    ids_TK: Array
    weights_TK: Array


class LayerRecord(NamedTuple):
    """The results of a layer that are kept until the end of the step.

    plain_routing: own choice of the router; None in a decode step, where the predictor has seen it already.
    stats: statistics of the layer's dispatch.
    changes: what lossy techniques did to each token.
    num_computed: number of assignments that its experts computed; None before they ran.
    """

    plain_routing: Routing | None
    stats: DispatchStats
    changes: Changes | None
    num_computed: Array | None = None

    def final_stats(self, cache_counts: Counts) -> DispatchStats:
        """Returns the layer's statistics, with the counts of the cache for it."""
        assert self.num_computed is not None, "the layer's experts did not run"
        traffic = replace(self.stats.traffic, num_received=self.num_computed)
        return replace(self.stats, traffic=traffic, counts=self.stats.counts | cache_counts)


class HostJourney(NamedTuple):
    """The inputs from the host to one layer with experts: the ``Journey`` of a step that the host drives.

    layer: index among the layers with experts.
    knobs: settings of the lossy techniques; None switches them off.
    resident_E: which experts are in the pool; None if routing does not depend on it.
    predictor: predictor of a decode step; None if nothing is predicted.
    predictor_state: the predictor's state in this step.
    next_routers: routers of the next layers, if the predictor needs them.
    """

    layer: Array
    knobs: Knobs | None
    resident_E: Array | None
    predictor: Predictor | None = None
    predictor_state: PredictorState = None
    next_routers: list[RouterAhead] | None = None


class StepStart(NamedTuple):
    """A step before its first layer.

    rows: rows of the first layer.
    rotations: rotations of the rows in attention.
    seqs: sequences of the step.
    predictor_state: the predictor's state in this step.
    forecast_RE: forecast of the first layers for the host, made by ``stack_rows``; None if nothing is
        predicted.
    """

    rows: LayerRows
    rotations: Rotations
    seqs: Sequences
    predictor_state: PredictorState
    forecast_RE: Array | None


class AttentionResult(NamedTuple):
    """A layer before its experts run.

    x_ND: rows after attention and the shared expert.
    expert_input: input of the experts.
    record: what the layer keeps for the end of the step.
    predictor_state: the predictor's state in this step.
    report_RE: array for the host, made by ``stack_rows``: which experts are needed; then, if experts are
        predicted, each expert's highest gate score, and p and wanted of the layers ahead.
    """

    x_ND: Array
    expert_input: ExpertInput
    record: LayerRecord
    predictor_state: PredictorState
    report_RE: Array


class StepEnd(NamedTuple):
    """A step after its last layer.

    rows: rows after the last layer.
    seqs: sequences of the step.
    records: what each layer with experts keeps for the end of the step.
    predictor_state: the predictor's state in this step.
    """

    rows: LayerRows
    seqs: Sequences
    records: list[LayerRecord]
    predictor_state: PredictorState


class HostState(NamedTuple):
    """The part of ``DeviceState`` that the end of a step changes; the layers change the pages and the pool.

    totals: counts of the step's phase.
    latest_S: token sampled last for each seat.
    counts_SV: counts of each seat's tokens.
    predictor: predictor of the experts.
    """

    totals: MoETotals
    latest_S: Array
    counts_SV: Array
    predictor: Predictor


def stack_rows(*arrays: Array) -> Array:
    """Stacks rows ``[E]`` and ``[A, E]`` into ``[R, E]`` float32, one array for the host to wait for."""
    rows = [each if each.ndim == 2 else each[None] for each in arrays]
    return jnp.concatenate([each.astype(jnp.float32) for each in rows])


def forecast_of(rows_RE: np.ndarray) -> Forecast:
    """Returns the forecast on the host, from the 2 * A rows of ``stack_rows``'s array that hold it."""
    p_AE, wanted_AE = np.split(rows_RE, 2)
    return Forecast(p_AE, wanted_AE > 0)  # pyright: ignore[reportArgumentType]
