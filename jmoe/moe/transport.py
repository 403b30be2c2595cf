"""How tokens reach the ranks that hold their experts. One signature, all lossless.

Inside ``shard_map``: in come a shard's own tokens and its own experts' weights, out comes every own
token's combined expert output. ``local`` is the case without expert parallelism.

``replicated``  all-gather the tokens, compute the local experts' share for all of them, reduce-scatter.
                Two collectives of R * T rows whatever the routing: right for small decode batches.
``all_to_all``  send each assignment's row to its expert's rank in a padded buffer of C = T * min(K, L) rows
                a destination, the worst case, so nothing is ever dropped.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from jmoe.mesh import EXPERT
from jmoe.moe.routing import plan_dispatch
from jmoe.moe.types import DispatchPlan, Routing

TransportName = Literal["replicated", "all_to_all"]
# (x_TD, plan weights_TK, plan) -> y_TD, bound to the shard's experts
Compute = Callable[[Array, Array, DispatchPlan], Array]
Transport = Callable[[Array, Routing, Array, int, Compute], Array]


def local(x_TD: Array, routing: Routing, valid_T: Array, experts: int, compute: Compute) -> Array:
    """All experts are here."""
    return compute(x_TD, routing.weights_TK, plan_dispatch(routing.ids_TK, valid_T, 0, experts))


def replicated(
    x_TD: Float[Array, "T D"], routing: Routing, valid_T: Bool[Array, " T"], experts: int, compute: Compute
) -> Float[Array, "T D"]:
    """Every rank sees every token of its data group and computes its own experts' share."""
    gather = partial(lax.all_gather, axis_name=EXPERT, axis=0, tiled=True)
    ids, weights, valid = gather(routing.ids_TK), gather(routing.weights_TK), gather(valid_T)
    first = lax.axis_index(EXPERT) * experts
    y = compute(gather(x_TD), weights, plan_dispatch(ids, valid, first, experts))
    return lax.psum_scatter(y, EXPERT, scatter_dimension=0, tiled=True)


def all_to_all(
    x_TD: Float[Array, "T D"], routing: Routing, valid_T: Bool[Array, " T"], experts: int, compute: Compute
) -> Float[Array, "T D"]:
    """Rows travel to their expert's rank and back; ranks receive R * C rows, the absent ones masked."""
    t, k = routing.ids_TK.shape
    ranks = lax.axis_size(EXPERT)
    c = t * min(k, experts)
    owner = plan_dispatch(routing.ids_TK // experts, valid_T, 0, ranks)  # assignments sorted by rank
    starts_R = jnp.cumsum(owner.group_sizes_L) - owner.group_sizes_L
    row_RC = jnp.arange(c)[None]
    sent_RC = row_RC < owner.group_sizes_L[:, None]
    flat_RC = owner.order_N.at[starts_R[:, None] + row_RC].get(mode="fill", fill_value=0)

    exchange = partial(lax.all_to_all, axis_name=EXPERT, split_axis=0, concat_axis=0)
    ids_RC = jnp.where(sent_RC, routing.ids_TK.reshape(-1)[flat_RC] % experts, -1)
    got_ids_N = exchange(ids_RC).reshape(ranks * c)
    got_x_ND = exchange(x_TD[flat_RC // k]).reshape(ranks * c, -1)

    plan = plan_dispatch(got_ids_N[:, None], got_ids_N >= 0, 0, experts)
    y_RCD = exchange(compute(got_x_ND, jnp.ones((ranks * c, 1)), plan).reshape(ranks, c, -1))
    weights_RC = jnp.where(sent_RC, routing.weights_TK.reshape(-1)[flat_RC], 0.0)
    return jnp.zeros(x_TD.shape, jnp.float32).at[flat_RC // k].add(y_RCD * weights_RC[..., None])


def get_transport(name: TransportName) -> Transport:
    if name not in get_args(TransportName):
        raise ValueError(f"transport {name!r} is unknown; known: {', '.join(get_args(TransportName))}")
    return {"replicated": replicated, "all_to_all": all_to_all}[name]
