"""The choice of a predictor by name."""

from typing import NamedTuple, get_args

import numpy as np
from jax import Array
from jaxtyping import Float

from jmoe.config.techniques import PredictorName
from jmoe.offload.predictors.expert_map import ExpertMaps
from jmoe.offload.predictors.history import History
from jmoe.offload.predictors.map_store import MapStore
from jmoe.offload.predictors.next_gate import NextGate
from jmoe.offload.predictors.none import NoPredictor
from jmoe.offload.predictors.request_counts import RequestCounts
from jmoe.offload.predictors.token_table import TokenTable
from jmoe.offload.types import Predictor

NAMES = get_args(PredictorName)


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
    """Makes the predictor called ``name``, one of NAMES; raises ValueError for another name or a missing
    input.

    profile: the model's routing on some text; without it expert_map begins empty, and counts knows only a
        request's own past.
    embeddings_VD: the model's input embeddings, for expert_map.
    capacity: number of iterations that expert_map keeps.
    online: whether expert_map learns from every step; by default it does if it has no profile.
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
    """Fills a store with the profile's single iterations, in random order: they are in the order of the text,
    and if there are more than the store holds, the last domain would fill most of it."""
    tokens_QM, maps_QMLE = profile.sample.map_tokens_QM, profile.sample.maps_QMLE
    there_QM = tokens_QM >= 0
    order_I = np.random.default_rng(0).permutation(int(there_QM.sum()))
    embeddings_ID = np.asarray(embeddings_VD)[tokens_QM[there_QM][order_I]].astype(np.float32)
    maps_ILE = maps_QMLE[there_QM][order_I].astype(np.float32)
    return MapStore.build(embeddings_ID, maps_ILE, capacity, distance)
