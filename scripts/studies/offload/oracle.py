"""A predictor that knows what each step will need: no predictor can do better."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

from jmoe.offload.predictors.choose import FullForecast
from jmoe.offload.predictors.none import FixedPredictor
from jmoe.offload.types import Forecast, LayerView, StepView


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Oracle(FixedPredictor):
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
        self, walk: FullForecast, layer: Int[Array, ""], view: LayerView
    ) -> tuple[FullForecast, Forecast]:
        return walk, walk.window(layer + 1, self.distance)
