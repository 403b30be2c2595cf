"""The kernel that both Pallas lowerings share: its passes over tiles of tokens, and its calls.

One program holds everything, because the set depends on every token and a decode batch is small. Pass one
routes and counts votes, pass two remaps, pass three writes the order; between passes, scores and places stand
in memory. With ``total``, a first call only counts votes, and the second one routes again.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Bool, Float

from jmoe_kernels.binning import body
from jmoe_kernels.binning.plan import Lowering, Plan, Ref
from jmoe_kernels.binning.types import VOTE_ROWS, Binned, Rule


def _tile(plan: Plan, ref: Ref, first: Array | int) -> Array:
    return ref[pl.ds(first, plan.chunk), :]


def _logits(plan: Plan, ref: Ref, first: Array | int) -> Float[Array, "T E"]:
    """Returns a tile of logits, with -inf in the lanes that are not experts."""
    tile_TE = _tile(plan, ref, first)
    return jnp.where(body.iota(tile_TE.shape, 1) < plan.experts, tile_TE, -jnp.inf)


def _no_votes(plan: Plan) -> tuple[Array, ...]:
    return (jnp.zeros((1, plan.lanes), jnp.int32),) * VOTE_ROWS


def _add(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def count_votes(logits_TE: Ref, role_T1: Ref, votes_VE: Ref, *, plan: Plan, rule: Rule) -> None:
    """Writes the table of votes; this is the first call if there is a ``total``."""

    def step(first: Array | int, votes: tuple[Array, ...]) -> tuple[Array, ...]:
        tile_TE = _logits(plan, logits_TE, first)
        _, place_TE = body.route(tile_TE, plan.experts, plan.k)
        return _add(votes, body.cast_votes(place_TE, tile_TE, _tile(plan, role_T1, first), rule))

    for row, votes_1E in enumerate(plan.over_tiles(step, _no_votes(plan))):
        votes_VE[pl.ds(row, 1), :] = votes_1E


def bin_all(
    logits_TE: Ref, role_T1: Ref, *refs: Ref, plan: Plan, rule: Rule, renormalize: bool, lowering: Lowering
) -> None:
    """Computes everything, from the batch's own votes or, with one more input, from those of all ranks."""
    *total_VE, plain_ids, plain_weights, ids, weights, scores_TE, active, order, sizes, place_TE, new_TE = (
        refs
    )
    k, block = plan.k, min(plan.lanes, lowering.pairs // plan.lanes)
    lane_TE = body.iota((plan.chunk, plan.lanes), 1)
    tile = partial(_tile, plan)

    def route(first: Array | int, votes: tuple[Array, ...]) -> tuple[Array, ...]:
        logit_TE, rows = _logits(plan, logits_TE, first), pl.ds(first, plan.chunk)
        score_TE, choice_TE = body.route(logit_TE, plan.experts, k)
        scores_TE[rows, :], place_TE[rows, :] = score_TE, choice_TE
        lowering.scatter(plain_ids, first, lane_TE, choice_TE, k)
        plain_TE = body.weigh(score_TE, choice_TE, rule, renormalize)
        lowering.scatter(plain_weights, first, plain_TE, choice_TE, k)
        return _add(votes, body.cast_votes(choice_TE, logit_TE, tile(role_T1, first), rule))

    votes = plan.over_tiles(route, _no_votes(plan))
    if total_VE:
        votes = tuple(total_VE[0][pl.ds(row, 1), :] for row in range(VOTE_ROWS))
    active_1E = body.choose_active(votes, rule, block)
    active[...] = active_1E.astype(jnp.int32)
    lowering.barrier()

    def remap(first: Array | int, sizes_1E: Array) -> Array:
        score_TE, choice_TE, role = (tile(ref, first) for ref in (scores_TE, place_TE, role_T1))
        plain_TE = body.weigh(score_TE, choice_TE, rule, renormalize)
        logit_TE = _logits(plan, logits_TE, first)
        moved_TE, touched_T1 = body.remap(choice_TE, logit_TE, active_1E, role, k)
        new_TE[pl.ds(first, plan.chunk), :] = moved_TE
        lowering.scatter(ids, first, lane_TE, moved_TE, k)
        new_weights_TE = body.reweigh(plain_TE, score_TE, moved_TE, touched_T1, k)
        lowering.scatter(weights, first, new_weights_TE, moved_TE, k)
        return sizes_1E + body.count_true((moved_TE < k) & (role > 0), 0)

    sizes_1E = plan.over_tiles(remap, jnp.zeros((1, plan.lanes), jnp.int32))
    sizes[...] = sizes_1E
    lowering.barrier()

    def write_order(first: Array | int, state: tuple[Array, Array]) -> tuple[Array, Array]:
        moved_TE, role = tile(new_TE, first), tile(role_T1, first)
        slot_TE, *next_state = body.order_slots(moved_TE, role > 0, *state, k)
        lowering.order(order, first, slot_TE, moved_TE, k)
        return next_state[0], next_state[1]

    padding = body.fold_axis(jnp.sum, sizes_1E, 1)
    plan.over_tiles(write_order, (body.group_starts(sizes_1E, block), padding))


def bin_experts(
    logits_TE: Float[Array, "T E"],
    valid_T: Bool[Array, " T"],
    lossy_T: Bool[Array, " T"],
    rule: Rule,
    lowering: Lowering,
    *,
    renormalize: bool,
    total: Callable[[Array], Array] | None,
) -> Binned:
    """Does the work of ``api.bin_experts`` in one call of the kernel, or in two if there is a ``total``."""
    (t, experts), k = logits_TE.shape, rule.k
    plan = Plan.make(t, experts, k, lowering.least_lanes)
    n, e = plan.rows, plan.lanes
    logits_TE = jnp.pad(logits_TE, ((0, n - t), (0, e - experts)))
    role_T1 = jnp.pad(valid_T.astype(jnp.int32) + (valid_T & lossy_T).astype(jnp.int32), (0, n - t))[:, None]
    operands = [logits_TE, role_T1]
    if total is not None:
        kernel = partial(count_votes, plan=plan, rule=rule)
        out = jax.ShapeDtypeStruct((VOTE_ROWS, e), jnp.int32)
        votes_VE = lowering.call(kernel, out_shape=out, name="bin_experts_votes")(*operands)
        operands.append(jnp.pad(total(votes_VE[:, :experts]), ((0, 0), (0, e - experts))))
    i, f = jnp.int32, jnp.float32
    by_choice_shapes = [((n, k + lowering.spare), dtype) for dtype in (i, f, i, f)]
    order = (1, n * k + lowering.spare)
    rows = [((n, e), f), ((1, e), i), (order, i), ((1, e), i), ((n, e), i), ((n, e), i)]
    out = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (*by_choice_shapes, *rows)]
    kernel = partial(bin_all, plan=plan, rule=rule, renormalize=renormalize, lowering=lowering)
    results = lowering.call(kernel, out_shape=out, name="bin_experts")(*operands)
    *by_choice, scores_TE, active_1E, order_1N, sizes_1E, _, _ = results
    plain_ids, plain_weights, ids, weights = (x[:t, :k] for x in by_choice)
    return Binned(
        plain_ids,
        plain_weights,
        ids,
        weights,
        scores_TE[:t, :experts],
        active_1E[0, :experts] > 0,
        order_1N[0, : t * k],
        sizes_1E[0, :experts],
    )
