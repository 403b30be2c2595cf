"""Which experts the rows of one layer go to, as the cache needs it: inside jit, for every executor."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jmoe.moe.routing import plan_dispatch
from jmoe.moe.types import DispatchPlan, Routing


def assigned(routing: Routing, valid_T: Bool[Array, " T"]) -> Int[Array, "T K"]:
    """The experts of valid tokens; E, which means none, for the others."""
    return jnp.where(valid_T[:, None], routing.ids_TK, routing.scores_TE.shape[1])


def needed(ids_TK: Int[Array, "T K"], experts: int) -> Bool[Array, " E"]:
    return jnp.zeros(experts, bool).at[ids_TK.reshape(-1)].set(True, mode="drop")


def highest(scores_TE: Float[Array, "T E"], valid_T: Bool[Array, " T"]) -> Float[Array, " E"]:
    """The highest score of each expert over the valid tokens with a finite score; 0 if there are none."""
    return jnp.max(jnp.where(valid_T[:, None] & jnp.isfinite(scores_TE), scores_TE, 0.0), axis=0)


def by_slot(ids_TK: Int[Array, "T K"], slot_E: Int[Array, " E"], nowhere: int) -> DispatchPlan:
    """The assignments in the order of their experts' slots, 0 to ``nowhere - 1``; ``nowhere`` means none."""
    slot_TK = jnp.append(slot_E, jnp.int32(nowhere))[ids_TK]
    return plan_dispatch(slot_TK, jnp.ones(len(ids_TK), bool), 0, nowhere)
