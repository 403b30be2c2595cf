"""The sizes and inputs from which predictors are made, and the code that most of them share."""

from typing import ClassVar, NamedTuple, Protocol, Self

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jmoe.offload.predictors.history import History
from jmoe.offload.types import Forecast, Predictor, PredictorState


class PredictorSizes(NamedTuple):
    """The sizes that a predictor is made for.

    distance: A, layers ahead.
    k: experts per token.
    layers: layers with experts.
    experts: experts of a layer.
    seats: maximum number of requests that run at once.
    store_size: number of iterations that "expert_map" keeps.
    """

    distance: int
    k: int
    layers: int
    experts: int
    seats: int
    store_size: int


class PredictorInputs(NamedTuple):
    """The inputs from which a predictor may be made; its ``from_inputs`` refuses if one that it needs is
    missing.

    profile: routing of the model on some text.
    embeddings_VD: input embeddings of the model.
    is_online: whether "expert_map" learns from every step; None means that it does if it has no profile.
    """

    profile: History | None = None
    embeddings_VD: Float[Array | np.ndarray, "V D"] | None = None
    is_online: bool | None = None


class NamedPredictor(Predictor, Protocol):
    """A predictor that the config can name."""

    @classmethod
    def from_inputs(cls, sizes: PredictorSizes, inputs: PredictorInputs) -> Self:
        """Makes the predictor; raises ValueError if an input is missing that it needs."""
        ...

    @classmethod
    def store_bytes(cls, *, layers: int, experts: int, width: int, store_size: int) -> int:
        """Returns the device bytes of a store whose size the config sets, for a model ``width`` wide."""
        ...


class BasePredictor:
    """A predictor that learns nothing and has no store; a subclass adds ``from_inputs`` (see
    ``NamedPredictor``; only if the config names it), ``start`` and ``observe``."""

    uses_next_routers: ClassVar[bool] = False

    @classmethod
    def store_bytes(cls, *, layers: int, experts: int, width: int, store_size: int) -> int:
        return 0

    def finish(self, state: PredictorState) -> Self:
        return self

    def add_prompts(self, seats_B: Array, fresh_B: Array, counts_BLE: Array) -> Self:
        return self


def no_forecast(distance: int, experts: int) -> Forecast:
    return Forecast(jnp.zeros((distance, experts), jnp.float32), jnp.zeros((distance, experts), bool))
