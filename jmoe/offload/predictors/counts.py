"""``RequestCounts`` forecasts the experts of the past request that is most similar to this one so far.

This is MoE-Infinity's idea, a baseline in fMoE: a request is the matrix of how often it chose each expert,
over its prompt and all its steps.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from jmoe.offload.predictors.base import BasePredictor, PredictorInputs, PredictorSizes
from jmoe.offload.predictors.forecasts import FullForecast, over_batch, top
from jmoe.offload.predictors.map_store import EXACT
from jmoe.offload.types import Forecast, LayerView, StepView


class ChosenExperts(NamedTuple):
    """The predictor's state in one step.

    plan: forecast of the step's experts.
    seats_B: seat of each row's request.
    valid_B: whether the row is a token, not padding.
    chosen_BLE: experts that each token has chosen so far.
    """

    plan: FullForecast
    seats_B: Int[Array, " B"]
    valid_B: Bool[Array, " B"]
    chosen_BLE: Float[Array, "B L E"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RequestCounts(BasePredictor):
    """Predicts by the most similar past request.

    stored_QLE: share of each expert in a layer's choices, for Q past requests; with Q = 0 a request is
        expected to choose as in its own past.
    counts_ZLE: how often the request in each of Z seats chose each expert.
    distance: A, layers ahead.
    k: experts per token; the k likeliest are wanted.
    """

    stored_QLE: Float[Array, "Q L E"]
    counts_ZLE: Float[Array, "Z L E"]
    distance: int = field(metadata={"static": True})
    k: int = field(metadata={"static": True})

    @classmethod
    def from_inputs(cls, sizes: PredictorSizes, inputs: PredictorInputs) -> Self:
        """Makes the predictor; without a profile it knows only a request's own past."""
        none_QLE = np.zeros((0, sizes.layers, sizes.experts))
        past_QLE = none_QLE if inputs.profile is None else inputs.profile.sample.experts_QLE
        return cls.make(past_QLE, seats=sizes.seats, distance=sizes.distance, k=sizes.k)

    @classmethod
    def make(cls, experts_QLE: Int[np.ndarray, "Q L E"], *, seats: int, distance: int, k: int) -> Self:
        """Makes the predictor from Q past requests.

        experts_QLE: how often each of Q requests chose each expert.
        """
        stored_QLE = _shares(jnp.asarray(experts_QLE, jnp.float32))
        return cls(stored_QLE, jnp.zeros((seats, *stored_QLE.shape[1:]), jnp.float32), distance, k)

    def start(self, view: StepView) -> tuple[ChosenExperts, Forecast]:
        share_BLE = _shares(self.counts_ZLE[view.seats_B])
        p_BLE = self._matches(share_BLE) if len(self.stored_QLE) else share_BLE
        plan = FullForecast.make(over_batch(p_BLE, top(p_BLE, self.k), view.valid_B), self.distance)
        state = ChosenExperts(plan, view.seats_B, view.valid_B, jnp.zeros_like(p_BLE))
        return state, plan.window(0, self.distance)

    def observe(
        self, state: ChosenExperts, layer: Int[Array, ""], view: LayerView
    ) -> tuple[ChosenExperts, Forecast]:
        experts_11E = jnp.arange(state.chosen_BLE.shape[2], dtype=view.ids_BK.dtype)[None, None]
        chosen_BE = jnp.any(view.ids_BK[:, :, None] == experts_11E, 1).astype(jnp.float32)
        state = state._replace(chosen_BLE=state.chosen_BLE.at[:, layer].set(chosen_BE))
        return state, state.plan.window(layer + 1, self.distance)

    def finish(self, state: ChosenExperts) -> Self:
        return self._add(state.seats_B, state.chosen_BLE * state.valid_B.astype(jnp.float32)[:, None, None])

    def add_prompts(
        self, seats_B: Int[Array, " B"], fresh_B: Bool[Array, " B"], counts_BLE: Float[Array, "B L E"]
    ) -> Self:
        """Adds the counts of pieces of prompts. If a piece begins a request, it first drops the counts of the
        seat's previous request."""
        forgotten_B = jnp.where(fresh_B, seats_B, len(self.counts_ZLE))
        reset_ZLE = self.counts_ZLE.at[forgotten_B].set(0, mode="drop")
        return replace(self, counts_ZLE=reset_ZLE)._add(seats_B, counts_BLE)

    def _add(self, seats_B: Array, counts_BLE: Array) -> Self:
        """Adds counts to the seats. Padding rows have counts of 0, so their seat does not matter."""
        return replace(self, counts_ZLE=self.counts_ZLE.at[seats_B].add(counts_BLE, mode="drop"))

    def _matches(self, share_BLE: Float[Array, "B L E"]) -> Float[Array, "B L E"]:
        """Returns the stored request of the highest cosine over all layers, or their mean if nothing is known
        yet."""
        squares_Q = jnp.sum(self.stored_QLE * self.stored_QLE, (1, 2))
        dots_BQ = jnp.einsum("ble,qle->bq", share_BLE, self.stored_QLE, precision=EXACT)
        best_B = jnp.argmax(dots_BQ / jnp.sqrt(jnp.maximum(squares_Q, 1e-30))[None], 1)
        known_B11 = jnp.any(share_BLE > 0, (1, 2))[:, None, None]
        return jnp.where(known_B11, self.stored_QLE[best_B], jnp.mean(self.stored_QLE, 0)[None])


def _shares(counts_ZLE: Float[Array, "Z L E"]) -> Float[Array, "Z L E"]:
    """Returns each expert's share of its layer's choices, or 0 if there are none."""
    return counts_ZLE / jnp.maximum(jnp.sum(counts_ZLE, 2, keepdims=True), 1)
