"""The oracle knows what every step will need: no predictor and no eviction can do better."""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

from jmoe.offload.policy import UseHistory
from jmoe.offload.predictors.base import BasePredictor
from jmoe.offload.predictors.forecasts import FullForecast
from jmoe.offload.slot_table import SlotTable
from jmoe.offload.types import Forecast, LayerView, StepView


class KnownOutlook(NamedTuple):
    """An ``Outlook`` of experts whose next uses are known.

    p_LE: 1 for the experts that this step needs.
    wanted_LE: experts that this step needs.
    heat_LE: heat of the experts, as in ``Outlook``.
    due_LE: number of steps after this step until each expert is needed next.
    """

    p_LE: Any
    wanted_LE: Any
    heat_LE: Any
    due_LE: Any


def belady(usage: UseHistory, outlook: Any, layer: Any, distance: int) -> Any:
    """Returns 1 / (layers until the expert's next use): the eviction rule of the oracle.

    outlook: a ``KnownOutlook``.
    """
    xp = outlook.p_LE.__array_namespace__()
    until_L1 = (xp.arange(outlook.p_LE.shape[0], dtype=xp.int32) - layer)[:, None]
    later_LE = until_L1 + outlook.due_LE * outlook.p_LE.shape[0]
    until_LE = xp.where((until_L1 > 0) & (outlook.p_LE > 0), until_L1, later_LE)
    return (1.0 / until_LE.astype(xp.float32)).reshape(-1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Oracle(BasePredictor):
    """The oracle's predictor.

    needs_LE: experts that the step will need; ``dataclasses.replace`` sets it for each step.
    distance: number of layers that a forecast covers.
    """

    needs_LE: Bool[Array, "L E"]
    distance: int = field(metadata={"static": True})

    def start(self, view: StepView) -> tuple[FullForecast, Forecast]:
        plan = FullForecast.make(Forecast(self.needs_LE.astype(jnp.float32), self.needs_LE), self.distance)
        return plan, plan.window(0, self.distance)

    def observe(
        self, state: FullForecast, layer: Int[Array, ""], view: LayerView
    ) -> tuple[FullForecast, Forecast]:
        return state, state.window(layer + 1, self.distance)


def with_future(table: SlotTable, oracle: Oracle, needs_LE: Array, due_LE: Array) -> tuple[SlotTable, Oracle]:
    """Returns the table and the oracle that know the coming step and all later ones
    (``studies.offload.simulator.next_uses``)."""
    outlook: Any = KnownOutlook(needs_LE.astype(jnp.float32), needs_LE, table.outlook.heat_LE, due_LE)
    return table._replace(outlook=outlook), replace(oracle, needs_LE=needs_LE)
