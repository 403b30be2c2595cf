"""The next layers' own routers, applied to this layer's input."""

from dataclasses import dataclass, field
from typing import ClassVar, Self

import jax
from jax import Array
from jaxtyping import Bool, Int

from jmoe.offload.predictors.base import BasePredictor, PredictorInputs, PredictorSizes, no_forecast
from jmoe.offload.predictors.forecasts import over_batch, top
from jmoe.offload.predictors.token_table import TokenTable
from jmoe.offload.types import Forecast, LayerView, StepView


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NextGate(BasePredictor):
    """Applies the next layers' own routers to this layer's input (Mixtral-Offloading, cross-layer gate).

    Before the first layer there is no router input: then the forecast comes from the token table if a profile
    gave one (ours); if not, nothing is expected.

    table: token table of the profile; None without a profile.
    distance: number of layers ahead.
    experts: number of experts of a layer.
    k: number of experts per token.
    """

    uses_next_routers: ClassVar[bool] = True

    table: TokenTable | None
    distance: int = field(metadata={"static": True})
    experts: int = field(metadata={"static": True})
    k: int = field(metadata={"static": True})

    @classmethod
    def from_inputs(cls, sizes: PredictorSizes, inputs: PredictorInputs) -> Self:
        table = None if inputs.profile is None else TokenTable.from_inputs(sizes, inputs)
        return cls(table, sizes.distance, sizes.experts, sizes.k)

    def start(self, view: StepView) -> tuple[Bool[Array, " B"], Forecast]:
        if self.table is None:
            return view.valid_B, no_forecast(self.distance, self.experts)
        return view.valid_B, self.table.start(view)[1]

    def observe(
        self, state: Bool[Array, " B"], layer: Int[Array, ""], view: LayerView
    ) -> tuple[Bool[Array, " B"], Forecast]:
        """Forecasts the next layers by their own routers.

        state: whether each row is a token, not padding.
        """
        if view.next_scores_BAE is None:
            raise ValueError("next_gate needs the scores of the next layers' routers")
        return state, over_batch(view.next_scores_BAE, top(view.next_scores_BAE, self.k), state)
