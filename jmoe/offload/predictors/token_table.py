"""``TokenTable``: how often a token id chose each expert when a profile was made.

Sem-MoE's C_p (arXiv 2503.04398) as a predictor: it forecasts all layers before the first one, and the
forecast does not change within a step.
"""

from dataclasses import dataclass, field
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int, UInt8

from jmoe.offload.predictors.base import BasePredictor, PredictorInputs, PredictorSizes
from jmoe.offload.predictors.forecasts import FullForecast, over_batch, top
from jmoe.offload.predictors.history import History
from jmoe.offload.types import Forecast, LayerView, StepView


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenTable(BasePredictor):
    """Predicts by the token id.

    table_RLE: P(expert | token id) in 255ths: a row for each of the R - 1 most frequent ids and, last, a row
        for all tokens.
    row_V: row of every token id.
    distance: A, layers ahead.
    k: experts per token; the k likeliest are wanted.
    """

    table_RLE: UInt8[Array, "R L E"]
    row_V: Int[Array, " V"]
    distance: int = field(metadata={"static": True})
    k: int = field(metadata={"static": True})

    @classmethod
    def from_inputs(cls, sizes: PredictorSizes, inputs: PredictorInputs) -> Self:
        if inputs.profile is None:
            raise ValueError("token_table needs a profile")
        return cls.make(inputs.profile, distance=sizes.distance, k=sizes.k)

    @classmethod
    def make(cls, history: History, *, distance: int, k: int, rows: int = 4096) -> Self:
        """Makes the table from a profile.

        rows: maximum number of token ids with a row of their own, L * E bytes each. An id that never occurred
            has the row of its nearest seen id; ids without a row of their own have the row of all tokens.
        """
        frequency_V, layers = history.frequency_V, len(history.loads_LE)
        kept_R = np.sort(np.argsort(-frequency_V, kind="stable")[: min(rows, np.count_nonzero(frequency_V))])
        share_LRE = [history.chosen(layer, kept_R) / frequency_V[kept_R][:, None] for layer in range(layers)]
        all_LE = history.loads_LE / max(1, history.tokens)
        table_RLE = np.concatenate([np.stack(share_LRE, 1), all_LE[None]])
        row_V = np.full(len(frequency_V), len(kept_R), np.int32)
        row_V[kept_R] = np.arange(len(kept_R))
        table_RLE = np.rint(table_RLE * 255).astype(np.uint8)
        return cls(jnp.asarray(table_RLE), jnp.asarray(row_V[history.nearest_V]), distance, k)

    def start(self, view: StepView) -> tuple[FullForecast, Forecast]:
        p_BLE = self.table_RLE[self.row_V[view.tokens_B]].astype(jnp.float32) / 255
        plan = FullForecast.make(over_batch(p_BLE, top(p_BLE, self.k), view.valid_B), self.distance)
        return plan, plan.window(0, self.distance)

    def observe(
        self, state: FullForecast, layer: Int[Array, ""], view: LayerView
    ) -> tuple[FullForecast, Forecast]:
        return state, state.window(layer + 1, self.distance)
