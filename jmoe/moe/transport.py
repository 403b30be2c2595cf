"""Brings tokens to the ranks that hold their experts. All transports have one signature and are lossless.

They run inside ``shard_map``. The input is a shard's own tokens and its own experts; the output is the
combined expert output of every own token, float32, and the rows moved for it (``Traffic``). T and J are those
of a shard, R is the number of ranks of the expert axis, L the number of a rank's experts, and A the number of
a shard's assignments, T * J. ``local`` is the case without expert parallelism.

``replicated``         all-gather the tokens, compute the local experts' share of all of them, reduce-scatter.
                       Two collectives of R * T rows for any routing: suitable for small decode batches.
``all_to_all``         send each assignment's row to its expert's rank in a padded buffer of C = T * min(J, L)
                       rows per destination, the worst case, so nothing is ever dropped.
``ragged_all_to_all``  send the same rows without padding; a rank's buffer still has room for the worst case,
                       R * C rows, and experts read only the rows that arrived. Rows arrive sorted by expert.
                       XLA:CPU does not implement the collective; an emulation there gathers every rank's
                       rows, so that all offsets are computed and tested, with the traffic of ``replicated``.
                       The TPU compiler refuses it on slices with limited ICI routing, v5e 4x8 and larger;
                       v6e, v5p and tpu7x accept it.

Rows are sent in the experts' weight dtype, to which the experts round them anyway, and return as float32.
"""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int, Shaped
from jmoe_kernels.backends import get_backend
from jmoe_kernels.rows import take_rows

from jmoe.config.moe import TransportName
from jmoe.mesh import DATA, EXPERT
from jmoe.moe.routing import plan_dispatch
from jmoe.moe.types import LocalExperts, Routing, Send, Traffic

# (operand, output, input_offsets, send_sizes, output_offsets, recv_sizes) -> output with the rows received
Exchange = Callable[[Array, Array, Array, Array, Array, Array], Array]


def get_exchange(platform: str, axis_name: str) -> Exchange:
    """Returns the exchange along ``axis_name`` for devices of ``platform``; it works inside ``shard_map``
    only."""
    has_own = get_backend(platform).has_ragged_exchange
    run = lax.ragged_all_to_all if has_own else emulated_ragged_all_to_all
    return partial(run, axis_name=axis_name)


def starts(sizes: Int[Array, "*N"], axis: int) -> Int[Array, "*N"]:
    """Returns the start of each of the consecutive groups of ``sizes`` along ``axis``."""
    return jnp.cumsum(sizes, axis=axis, dtype=jnp.int32) - sizes


def emulated_ragged_all_to_all(
    operand: Shaped[Array, "N *D"],
    output: Shaped[Array, "M *D"],
    input_offsets: Int[Array, " I"],
    send_sizes: Int[Array, " I"],
    output_offsets: Int[Array, " I"],
    recv_sizes: Int[Array, " I"],
    *,
    axis_name: str,
) -> Shaped[Array, "M *D"]:
    """Returns ``output`` with the received slices written into it, as ``lax.ragged_all_to_all`` does, on any
    platform.

    The I slices of a rank are I / R for each rank in turn: slice i is ``send_sizes[i]`` rows of ``operand``
    from ``input_offsets[i]``, and lands at row ``output_offsets[i]`` of its receiver's ``output``. If slices
    overlap, the last slice wins.

    recv_sizes: sizes in rows of the arriving slices, by sender.
    """
    del send_sizes  # the receivers' sizes say the same
    arriving = partial(lax.all_to_all, axis_name=axis_name, split_axis=0, concat_axis=0, tiled=True)
    from_I, to_I = arriving(input_offsets), arriving(output_offsets)
    slices = from_I.shape[0]
    each = slices // lax.axis_size(axis_name)
    all_rows = lax.all_gather(operand, axis_name, tiled=True)
    first_I = jnp.arange(slices) // each * operand.shape[0] + from_I  # in all_rows

    row_M = jnp.arange(output.shape[0])
    covers_IM = (row_M[None] >= to_I[:, None]) & (row_M[None] < (to_I + recv_sizes)[:, None])
    slice_M = jnp.max(jnp.where(covers_IM, jnp.arange(slices)[:, None], -1), axis=0)
    received = all_rows.at[first_I[slice_M] + row_M - to_I[slice_M]].get(mode="fill", fill_value=0)
    is_new = (slice_M >= 0).reshape(-1, *(1,) * (output.ndim - 1))
    return jnp.where(is_new, received, output)


def local(
    x_TD: Float[Array, "T D"], routing: Routing, valid_T: Bool[Array, " T"], experts: LocalExperts
) -> tuple[Float[Array, "T D"], Traffic]:
    """Runs the experts, all of which are on this rank; nothing is sent."""
    plan = routing.plan or plan_dispatch(routing.ids_TK, valid_T, 0, experts.num_experts)
    none = jnp.zeros((), jnp.int32)
    y_TD, computed = experts.run_tokens(x_TD, routing.weights_TK, plan)
    return y_TD, Traffic(none, none, computed)


def replicated(
    x_TD: Float[Array, "T D"], routing: Routing, valid_T: Bool[Array, " T"], experts: LocalExperts
) -> tuple[Float[Array, "T D"], Traffic]:
    """Gathers the tokens of a data group to all its ranks; each rank computes its own experts' share."""
    gather = partial(lax.all_gather, axis_name=EXPERT, axis=0, tiled=True)
    ids, weights, valid = gather(routing.ids_TK), gather(routing.weights_TK), gather(valid_T)
    first = lax.axis_index(EXPERT) * experts.num_experts
    plan = plan_dispatch(ids, valid, first, experts.num_experts)
    y, computed = experts.run_tokens(gather(x_TD.astype(experts.dtype)), weights, plan)
    traffic = _padded_traffic(routing, valid_T, experts, x_TD.shape[0], computed)
    return lax.psum_scatter(y, EXPERT, scatter_dimension=0, tiled=True), traffic


def all_to_all(
    x_TD: Float[Array, "T D"], routing: Routing, valid_T: Bool[Array, " T"], experts: LocalExperts
) -> tuple[Float[Array, "T D"], Traffic]:
    """Sends rows to their expert's rank and back; ranks receive R * C rows, with empty slots masked."""
    t, j = routing.ids_TK.shape
    ranks, local_experts = lax.axis_size(EXPERT), experts.num_experts
    c = t * min(j, local_experts)
    by_rank = plan_dispatch(routing.ids_TK // local_experts, valid_T, 0, ranks)
    row_RC = jnp.arange(c)[None]
    filled_RC = row_RC < by_rank.group_sizes_L[:, None]
    # The assignment in each slot (T * J if the slot is empty), and its inverse, the slot of each assignment.
    place_RC = starts(by_rank.group_sizes_L, 0)[:, None] + row_RC
    assignment_RC = jnp.where(filled_RC, by_rank.order_N.at[place_RC].get(mode="clip"), t * j)
    slots_RC = jnp.arange(ranks * c, dtype=jnp.int32).reshape(ranks, c)
    slot_N = jnp.full(t * j, ranks * c).at[assignment_RC].set(slots_RC, mode="drop")

    exchange = partial(lax.all_to_all, axis_name=EXPERT, split_axis=0, concat_axis=0, tiled=True)
    ids_N = routing.ids_TK.reshape(-1).at[assignment_RC.reshape(-1)].get(mode="clip") % local_experts
    got_ids_N = exchange(jnp.where(filled_RC.reshape(-1), ids_N, local_experts))
    assignment_N = assignment_RC.reshape(-1)
    rows_ND, weights_TJ = _outgoing(x_TD, routing, assignment_N, slot_N, experts)
    got_ND = exchange(rows_ND)

    plan = plan_dispatch(got_ids_N[:, None], jnp.ones(ranks * c, bool), 0, local_experts)
    y_ND, computed = experts.run_tokens(got_ND, jnp.ones((ranks * c, 1)), plan)
    y_TD = _combine(exchange(y_ND), slot_N, assignment_N, weights_TJ)
    return y_TD, _padded_traffic(routing, valid_T, experts, c, computed)


def ragged_all_to_all(
    x_TD: Float[Array, "T D"],
    routing: Routing,
    valid_T: Bool[Array, " T"],
    experts: LocalExperts,
    *,
    exchange: Exchange,
) -> tuple[Float[Array, "T D"], Traffic]:
    """Sends each expert's rows as one slice. They land expert by expert, after the rows from lower ranks."""
    t, j = routing.ids_TK.shape
    ranks, me = lax.axis_size(EXPERT), lax.axis_index(EXPERT)
    plan = plan_dispatch(routing.ids_TK, valid_T, 0, ranks * experts.num_experts)
    inverse_N = plan.inverse_N
    rows_ND, weights_TJ = _outgoing(x_TD, routing, plan.order_N, inverse_N, experts)

    # From the matrix of sent sizes [from, to, expert], every rank computes all offsets in the same way.
    sizes_E = plan.group_sizes_L
    sizes_RRL = lax.all_gather(sizes_E, EXPERT).reshape(ranks, ranks, experts.num_experts)
    starts_RRL = starts(sizes_RRL.reshape(ranks, -1), 1).reshape(sizes_RRL.shape)  # in the sender's rows
    group_sizes_RL = jnp.sum(sizes_RRL, axis=0)
    lands_RRL = starts(group_sizes_RL, 1)[None] + starts(sizes_RRL, 0)  # in the receiver's rows

    def outgoing(a_RRL: Int[Array, "R R L"]) -> Int[Array, " E"]:
        return a_RRL[me].reshape(-1)

    def incoming(a_RRL: Int[Array, "R R L"]) -> Int[Array, " E"]:
        return a_RRL[:, me].reshape(-1)

    room_MD = jnp.zeros((ranks * t * min(j, experts.num_experts), x_TD.shape[1]), rows_ND.dtype)
    got_MD = exchange(
        rows_ND, room_MD, outgoing(starts_RRL), sizes_E, outgoing(lands_RRL), incoming(sizes_RRL)
    )
    y_MD, computed = experts.run_rows(got_MD, group_sizes_RL[me])
    y_ND = exchange(
        y_MD, jnp.zeros(rows_ND.shape, y_MD.dtype),
        incoming(lands_RRL), incoming(sizes_RRL), incoming(starts_RRL), sizes_E,
    )  # fmt: skip
    sent = jnp.sum(sizes_E) - jnp.sum(sizes_RRL[me, me])
    traffic = Traffic(_useful_rows(routing, valid_T, experts), sent, computed)
    return _combine(y_ND, inverse_N, plan.order_N, weights_TJ), traffic


def _outgoing(
    x_TD: Array, routing: Routing, assignment_N: Array, row_A: Array, experts: LocalExperts
) -> tuple[Array, Array]:
    """Returns the rows of assignments ``assignment_N`` in the experts' dtype, and the weights of the returned
    rows.

    row_A: row of each assignment, the inverse of ``assignment_N``.
    """
    weights_TJ, back_TJ = routing.weights_TK, row_A.reshape(routing.weights_TK.shape)
    token_N = assignment_N // weights_TJ.shape[1]
    if not experts.weigh_input:
        return take_rows(x_TD.astype(experts.dtype), token_N, back_TJ), weights_TJ
    weight_N = weights_TJ.reshape(-1).at[assignment_N].get(mode="fill", fill_value=0)
    rows_ND = take_rows(x_TD, token_N, back_TJ) * weight_N[:, None]
    return rows_ND.astype(experts.dtype), jnp.ones_like(weights_TJ)


def _combine(
    y_ND: Float[Array, "N D"], row_A: Int[Array, " A"], assignment_N: Int[Array, " N"], weights_TJ: Array
) -> Float[Array, "T D"]:
    """Returns each token's weighted sum of its assignments' rows, in the order in which ``local`` sums them.

    row_A: row of each of the T * J assignments; past the end if it has none.
    assignment_N: inverse of ``row_A``.
    """
    chosen = take_rows(y_ND, row_A, assignment_N[:, None]).reshape(*weights_TJ.shape, -1)
    return jnp.einsum("tkd,tk->td", chosen, weights_TJ)


def _useful_rows(routing: Routing, valid_T: Array, experts: LocalExperts) -> Int[Array, ""]:
    """Returns the number of distinct pairs of an own token and another rank that holds one of its experts."""
    rank_TJ = routing.ids_TK // experts.num_experts  # R for an absent assignment
    away_TJ = (rank_TJ != lax.axis_index(EXPERT)) & (rank_TJ < lax.axis_size(EXPERT)) & valid_T[:, None]
    earlier_JJ = np.tri(rank_TJ.shape[1], k=-1, dtype=bool)
    again_TJ = jnp.any((rank_TJ[:, :, None] == rank_TJ[:, None]) & earlier_JJ[None], axis=-1)
    return jnp.sum(away_TJ & ~again_TJ, dtype=jnp.int32)


def _padded_traffic(
    routing: Routing, valid_T: Array, experts: LocalExperts, rows: int, computed: Array
) -> Traffic:
    """Returns the traffic of ``rows`` rows from each rank to each other rank, for any routing. Raises
    ValueError if the rows in one layer do not fit a 32-bit count."""
    ranks = lax.axis_size(EXPERT)
    sent = (ranks - 1) * rows
    everywhere = sent * ranks * lax.axis_size(DATA)
    if everywhere > np.iinfo(np.int32).max:  # terabytes per layer: the buffers would not fit a device either
        raise ValueError(f"{everywhere} rows between ranks in one layer do not fit a 32-bit count")
    return Traffic(_useful_rows(routing, valid_T, experts), jnp.asarray(sent, jnp.int32), computed)


def get_transport(name: TransportName, platform: str) -> Send:
    """Returns the transport called ``name`` for devices of ``platform`` ("cpu", "gpu", "tpu"). Raises
    ValueError for an unknown name."""
    if name not in TRANSPORTS:
        raise ValueError(f"transport {name!r} is unknown; known: {', '.join(TRANSPORTS)}")
    return TRANSPORTS[name](platform)


def _ragged_for(platform: str) -> Send:
    return partial(ragged_all_to_all, exchange=get_exchange(platform, EXPERT))


# each transport by its name in the config, made for devices of a platform
TRANSPORTS: dict[TransportName, Callable[[str], Send]] = {
    "replicated": lambda platform: replicated,
    "all_to_all": lambda platform: all_to_all,
    "ragged_all_to_all": _ragged_for,
}
