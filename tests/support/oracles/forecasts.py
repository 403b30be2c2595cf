"""Steps, layers and stores for the predictors of expert offload, and a step run by hand."""

import jax.numpy as jnp
import numpy as np
from support.models.routed import LAYERS, VOCAB, K, planted

from jmoe.offload.predictors.base import PredictorSizes
from jmoe.offload.predictors.map_store import MapStore
from jmoe.offload.types import Forecast, LayerView, Predictor, StepView

L, E, D, A = 5, 8, 6, 2
PROFILE, _ = planted()


def distributions(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.dirichlet(np.full(E, 0.3), shape).astype(np.float32)


def sizes(**changes: int) -> PredictorSizes:
    made = PredictorSizes(distance=A, k=K, layers=LAYERS, experts=E, seats=3, store_size=40)
    return made._replace(**changes)


def store_of(
    rng: np.random.Generator, entries: int, capacity: int
) -> tuple[MapStore, np.ndarray, np.ndarray]:
    """Returns a store, and the embeddings and maps of its entries."""
    embeddings_CD = rng.standard_normal((entries, D)).astype(np.float32)
    maps_CLE = distributions(rng, entries, L)
    return MapStore.build(embeddings_CD, maps_CLE, capacity, A), embeddings_CD, maps_CLE


def step_of(rng: np.random.Generator, valid: list[int], tokens: list[int] | None = None) -> StepView:
    b = len(valid)
    tokens_B = rng.integers(0, VOCAB, b) if tokens is None else np.array(tokens)
    return StepView(
        jnp.asarray(tokens_B, jnp.int32),
        jnp.asarray(rng.standard_normal((b, D)), jnp.float32),
        jnp.asarray(valid, bool),
        jnp.arange(b, dtype=jnp.int32),
    )


def layers_of(rng: np.random.Generator, b: int, layers: int = L, k: int = K) -> list[LayerView]:
    scores_LBE = distributions(rng, layers, b)
    ids_LBK = np.argsort(-scores_LBE, axis=2)[:, :, :k].astype(np.int32)
    ahead_LBAE = distributions(rng, layers, b, A)
    return [
        LayerView(*map(jnp.asarray, layer)) for layer in zip(scores_LBE, ids_LBK, ahead_LBAE, strict=True)
    ]


def walked(predictor: Predictor, seen: StepView, layers: list[LayerView]) -> tuple[Predictor, list[Forecast]]:
    """Runs one step, layer by layer; returns the predictor and its forecasts."""
    state, forecast = predictor.start(seen)
    forecasts = [forecast]
    for i, layer in enumerate(layers):
        state, forecast = predictor.observe(state, jnp.asarray(i, jnp.int32), layer)
        forecasts.append(forecast)
    return predictor.finish(state), forecasts


def np_cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))
