"""The plain router: a softmax over all experts, then the k best."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int


def route_softmax(
    logits_TE: Float[Array, "T E"], k: int, *, renormalize: bool
) -> tuple[Int[Array, "T K"], Float[Array, "T K"], Float[Array, "T E"]]:
    """Returns (ids, weights, scores) of each token's ``k`` experts by softmax, best first.

    Ties go to the lower id.
    """
    scores_TE = jax.nn.softmax(logits_TE.astype(jnp.float32), axis=-1)
    weights_TK, ids_TK = lax.top_k(scores_TE, k)
    if renormalize:
        weights_TK = weights_TK / jnp.sum(weights_TK, axis=-1, keepdims=True)
    return ids_TK.astype(jnp.int32), weights_TK, scores_TE
