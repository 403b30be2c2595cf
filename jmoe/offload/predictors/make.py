"""Predictors that keep no state between steps, and the choice of any predictor by name."""

from dataclasses import dataclass, field
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from jmoe.offload.predictors.choose import FullForecast, over_batch, top
from jmoe.offload.predictors.expert_map import ExpertMaps
from jmoe.offload.predictors.history import History
from jmoe.offload.predictors.map_store import MapStore
from jmoe.offload.predictors.request_counts import RequestCounts
from jmoe.offload.predictors.token_table import TokenTable
from jmoe.offload.types import Forecast, LayerView, Predictor, StepView

NAMES = ("expert_map", "next_gate", "token_table", "counts", "none")


class _Fixed:
    """A predictor that learns nothing."""

    def finish(self, walk: object) -> Self:
        return self

    def absorb(self, seats_B: Array, fresh_B: Array, counts_BLE: Array) -> Self:
        return self


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NoPredictor(_Fixed):
    """Expects nothing: experts come when they are needed."""

    distance: int = field(metadata={"static": True})
    experts: int = field(metadata={"static": True})

    def start(self, view: StepView) -> tuple[None, Forecast]:
        return None, _no_forecast(self.distance, self.experts)

    def observe(self, walk: None, layer: Int[Array, ""], view: LayerView) -> tuple[None, Forecast]:
        return None, _no_forecast(self.distance, self.experts)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NextGate(_Fixed):
    """Applies the next layers' own routers to this layer's input (Mixtral-Offloading, cross-layer gate).

    Before the first layer there is no router input: then the forecast comes from the token table if a profile
    gave one (ours); if not, nothing is expected.
    """

    table: TokenTable | None
    distance: int = field(metadata={"static": True})
    experts: int = field(metadata={"static": True})
    k: int = field(metadata={"static": True})

    def start(self, view: StepView) -> tuple[Bool[Array, " B"], Forecast]:
        if self.table is None:
            return view.valid_B, _no_forecast(self.distance, self.experts)
        return view.valid_B, self.table.start(view)[1]

    def observe(
        self, walk: Bool[Array, " B"], layer: Int[Array, ""], view: LayerView
    ) -> tuple[Bool[Array, " B"], Forecast]:
        """walk: whether each row is a token, not padding."""
        if view.next_scores_BAE is None:
            raise ValueError("next_gate needs the scores of the next layers' routers")
        return walk, over_batch(view.next_scores_BAE, top(view.next_scores_BAE, self.k), walk)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Oracle(_Fixed):
    """The oracle's predictor. needs_LE: which experts the step will need; ``dataclasses.replace`` sets it
    for each step."""

    needs_LE: Bool[Array, "L E"]
    distance: int = field(metadata={"static": True})

    def start(self, view: StepView) -> tuple[FullForecast, Forecast]:
        plan = FullForecast.make(Forecast(self.needs_LE.astype(jnp.float32), self.needs_LE), self.distance)
        return plan, plan.window(0, self.distance)

    def observe(
        self, walk: FullForecast, layer: Int[Array, ""], view: LayerView
    ) -> tuple[FullForecast, Forecast]:
        return walk, walk.window(layer + 1, self.distance)


class PredictorSizes(NamedTuple):
    """The sizes that a predictor is made for.

    distance: A, layers ahead.
    k: experts per token.
    layers: layers with experts.
    experts: experts of a layer.
    seats: maximum number of requests that run at once.
    """

    distance: int
    k: int
    layers: int
    experts: int
    seats: int


def make_predictor(
    name: str,
    sizes: PredictorSizes,
    profile: History | None = None,
    embeddings_VD: Float[Array | np.ndarray, "V D"] | None = None,
    capacity: int = 1000,
    online: bool | None = None,
) -> Predictor:
    """The predictor called ``name``, one of NAMES; ValueError for another name or a missing input.

    profile: the model's routing on some text; without it expert_map begins empty, and counts knows only a
        request's own past.
    embeddings_VD: for expert_map: the model's input embeddings.
    capacity: for expert_map: number of iterations that it keeps.
    online: for expert_map: whether it learns from every step; by default it does if it has no profile.
    """
    distance, k, layers, experts, seats = sizes
    if name not in NAMES:
        raise ValueError(f"unknown predictor {name!r}; it can be one of {', '.join(NAMES)}")
    if not 1 <= distance <= layers:
        raise ValueError(f"a predictor looks 1 to {layers} layers ahead, not {distance}")
    if capacity < 1:
        raise ValueError(f"a store holds 1 iteration or more, not {capacity}")
    if profile is not None and profile.loads_LE.shape != (layers, experts):
        found = " x ".join(map(str, profile.loads_LE.shape))
        raise ValueError(f"the profile has {found} experts, the model {layers} x {experts}")
    if name == "expert_map":
        if embeddings_VD is None:
            raise ValueError("expert_map needs the model's input embeddings")
        shape = (capacity, layers, experts, embeddings_VD.shape[1])
        store = (
            MapStore.empty(*shape)
            if profile is None
            else _filled_store(profile, embeddings_VD, capacity, distance)
        )
        return ExpertMaps.make(
            store, distance=distance, k=k, online=profile is None if online is None else online
        )
    by_token = None if profile is None else TokenTable.make(profile, distance=distance, k=k)
    if name == "token_table":
        if by_token is None:
            raise ValueError("token_table needs a profile")
        return by_token
    if name == "counts":
        past_QLE = np.zeros((0, layers, experts)) if profile is None else profile.sample.experts_QLE
        return RequestCounts.make(past_QLE, seats=seats, distance=distance, k=k)
    return NextGate(by_token, distance, experts, k) if name == "next_gate" else NoPredictor(distance, experts)


def _filled_store(
    profile: History, embeddings_VD: Array | np.ndarray, capacity: int, distance: int
) -> MapStore:
    """A store of the profile's single iterations, in random order: they are in the order of the text, and if
    there are more than the store holds, the last domain would fill most of it."""
    tokens_QM, maps_QMLE = profile.sample.map_tokens_QM, profile.sample.maps_QMLE
    there_QM = tokens_QM >= 0
    order_I = np.random.default_rng(0).permutation(int(there_QM.sum()))
    embeddings_ID = np.asarray(embeddings_VD)[tokens_QM[there_QM][order_I]].astype(np.float32)
    maps_ILE = maps_QMLE[there_QM][order_I].astype(np.float32)
    return MapStore.build(embeddings_ID, maps_ILE, capacity, distance)


def _no_forecast(distance: int, experts: int) -> Forecast:
    return Forecast(jnp.zeros((distance, experts), jnp.float32), jnp.zeros((distance, experts), bool))
