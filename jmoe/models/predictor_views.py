"""The view that a predictor of offloaded experts has of a step, and the data that it learns from.

Both executors use this: the compiled step (``step_techniques``) and the one that the host drives
(``jmoe.engine.offload``).
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jmoe.models.journey import RouterAhead
from jmoe.models.layer import DecoderLayer, router_ahead
from jmoe.moe.types import Routing
from jmoe.nn.sequences import Sequences
from jmoe.offload.predictors.make import PREDICTORS
from jmoe.offload.types import Predictor, StepView


def step_view(seqs: Sequences, x_ND: Float[Array, "N D"]) -> StepView | None:
    """Returns what a predictor sees of a decode step before the first layer, or None for a prefill."""
    if seqs.phase != "decode":
        return None
    seats_B = jnp.zeros(len(seqs.tokens_BT), jnp.int32) if seqs.seats_B is None else seqs.seats_B
    return StepView(seqs.tokens_BT[:, 0], x_ND, seqs.positions_BT[:, 0] >= 0, seats_B)


def routers_after(layers: Sequence[DecoderLayer], i: int) -> list[RouterAhead] | None:
    """Returns the routers of the next layers with experts after layer ``i``, as many as the predictor looks
    ahead; after the last such layer, that layer repeats. It returns None if the layer has no experts or the
    predictor does not use them."""
    experts = layers[i].moe
    offload = None if experts is None else experts.moe.offload
    if offload is None or not PREDICTORS[offload.predictor].uses_next_routers:
        return None
    later = [layer for j, layer in enumerate(layers) if j > i and layer.moe is not None] or [layers[i]]
    return [router_ahead(later[min(a, len(later) - 1)]) for a in range(offload.prefetch_distance)]


def add_prompts(predictor: Predictor, seqs: Sequences, routing: list[Routing]) -> Predictor:
    """Returns the predictor after it has learned what prompts chose; from decode steps it learns layer by
    layer (``Predictor.observe``).

    routing: the router's own choices, one entry per layer with experts.
    """
    if seqs.phase == "decode" or seqs.seats_B is None:
        return predictor
    (b, _), grid, experts = seqs.tokens_BT.shape, seqs.positions_RN.shape, routing[0].scores_TE.shape[1]
    valid_BTK = (seqs.positions_BT >= 0)[..., None]
    rows_B1 = jnp.arange(b)[:, None]

    def counts(ids_NK: Array) -> Array:
        ids_BTK = seqs.cut(ids_NK.reshape(*grid, -1))[-1]
        ids_BN = jnp.where(valid_BTK, ids_BTK, experts).reshape(b, -1)
        return jnp.zeros((b, experts), jnp.float32).at[rows_B1, ids_BN].add(1.0, mode="drop")

    counts_BLE = jnp.stack([counts(r.ids_TK) for r in routing], axis=1)
    fresh_B = seqs.positions_BT[:, 0] == 0 if seqs.fresh_B is None else seqs.fresh_B
    return predictor.add_prompts(seqs.seats_B, fresh_B, counts_BLE)
