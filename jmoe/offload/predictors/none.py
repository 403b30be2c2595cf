"""No prediction: experts come when they are needed. The module also has the base of predictors
that learn nothing.
"""

from dataclasses import dataclass, field
from typing import Self

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from jmoe.offload.types import Forecast, LayerView, StepView


class FixedPredictor:
    """A predictor that learns nothing."""

    def finish(self, walk: object) -> Self:
        return self

    def absorb(self, seats_B: Array, fresh_B: Array, counts_BLE: Array) -> Self:
        return self


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NoPredictor(FixedPredictor):
    """Expects nothing: experts come when they are needed."""

    distance: int = field(metadata={"static": True})
    experts: int = field(metadata={"static": True})

    def start(self, view: StepView) -> tuple[None, Forecast]:
        return None, no_forecast(self.distance, self.experts)

    def observe(self, walk: None, layer: Int[Array, ""], view: LayerView) -> tuple[None, Forecast]:
        return None, no_forecast(self.distance, self.experts)


def no_forecast(distance: int, experts: int) -> Forecast:
    return Forecast(jnp.zeros((distance, experts), jnp.float32), jnp.zeros((distance, experts), bool))
