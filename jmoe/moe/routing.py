"""Router logits -> Routing: softmax over all experts, top-k, and renormalisation where the model asks for it.

Source: the routers of Mixtral, Qwen3-MoE and OLMoE (softmax before top-k; Mixtral always renormalises,
which equals a softmax over the chosen logits).
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int
from jmoe_kernels.binning import route_softmax

from jmoe.moe.types import DispatchPlan, Routing


def route(logits_TE: Float[Array, "T E"], k: int, *, renormalize: bool) -> Routing:
    """Each token's ``k`` experts by softmax probability; ties go to the lower expert id."""
    logits_TE = logits_TE.astype(jnp.float32)
    return Routing(*route_softmax(logits_TE, k, renormalize=renormalize), logits_TE)


def plan_dispatch(
    ids_TK: Int[Array, "T K"], valid_T: Bool[Array, " T"], first: int | Array, experts: int
) -> DispatchPlan:
    """Sorts the assignments that go to experts ``first .. first + experts`` by expert.

    Padding tokens and other experts get the id one past the last, so a stable sort pushes them to the end
    and the counts ignore them.
    """
    local_TK = ids_TK - first
    here_TK = (local_TK >= 0) & (local_TK < experts) & valid_T[:, None]
    keys_N = jnp.where(here_TK, local_TK, experts).reshape(-1)
    n = keys_N.size
    if (experts + 1) * n > jnp.iinfo(jnp.int32).max:
        raise ValueError(f"{n} assignments to {experts} experts do not fit 32-bit sort keys")
    # One operand sorts ten times as fast on XLA:CPU as a stable sort of keys and places.
    sorted_N = lax.sort(keys_N * n + jnp.arange(n, dtype=jnp.int32), is_stable=False)
    return DispatchPlan(sorted_N % n, jnp.bincount(keys_N, length=experts).astype(jnp.int32))
