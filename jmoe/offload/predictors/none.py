"""No prediction: experts come when they are needed."""

from dataclasses import dataclass, field
from typing import Self

import jax
from jax import Array
from jaxtyping import Int

from jmoe.offload.predictors.base import BasePredictor, PredictorInputs, PredictorSizes, no_forecast
from jmoe.offload.types import Forecast, LayerView, StepView


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NoPredictor(BasePredictor):
    """Expects nothing: experts come when they are needed."""

    distance: int = field(metadata={"static": True})
    experts: int = field(metadata={"static": True})

    @classmethod
    def from_inputs(cls, sizes: PredictorSizes, inputs: PredictorInputs) -> Self:
        return cls(sizes.distance, sizes.experts)

    def start(self, view: StepView) -> tuple[None, Forecast]:
        return None, no_forecast(self.distance, self.experts)

    def observe(self, state: None, layer: Int[Array, ""], view: LayerView) -> tuple[None, Forecast]:
        return None, no_forecast(self.distance, self.experts)
