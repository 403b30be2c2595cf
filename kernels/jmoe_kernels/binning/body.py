"""The stages of binning on tiles [tokens, experts], in the few operations that every Pallas lowering has.

There is no gather, scatter, sort or prefix sum here: comparisons, sums and maxima along an axis, and products
of 0/1 matrices do all of it. Choices are dense: ``place_TE`` is an expert's place among its token's K
choices, 0 for the best, and K if the expert is not chosen. Lanes that only fill the tile up (ids from
``experts``) are never chosen, have no votes and are never active. Whatever decides an id is a whole number or
a float32 comparison as in ``reference``; no sum over tokens takes a logit or a score, so that a token's NaN
stays with the token. Whole numbers are summed over experts as float32, which is exact below 2**24: a TPU
takes half the time for it.
"""

from collections.abc import Callable, Sequence
from functools import reduce

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from jmoe_kernels.binning.reference import budget, edges
from jmoe_kernels.binning.types import BINS, EXACT, Rule


def iota(shape: tuple[int, ...], axis: int) -> Int[Array, "..."]:
    """Returns the index of each element along ``axis``."""
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def fold_axis(fold: Callable, x: Array, axis: int) -> Array:
    """Folds ``x`` along ``axis``, which stays as an axis of length one."""
    return fold(x, axis=axis, keepdims=True)


def count_true(mask: Bool[Array, "..."], axis: int) -> Int[Array, "..."]:
    """Counts the true elements of ``mask`` along ``axis``, which stays as an axis of length one."""
    return fold_axis(jnp.sum, mask.astype(jnp.float32), axis).astype(jnp.int32)


def mark_best(key_TE: Float[Array, "T E"]) -> Bool[Array, "T E"]:
    """Marks each token's largest key, and among equal keys the one with the lowest id. Keys are not NaN."""
    lane_TE = iota(key_TE.shape, 1).astype(jnp.float32)
    top_TE = key_TE == fold_axis(jnp.max, key_TE, 1)
    return lane_TE == fold_axis(jnp.min, jnp.where(top_TE, lane_TE, float(key_TE.shape[1] - 1)), 1)


def route(
    logits_TE: Float[Array, "T E"], experts: int, k: int
) -> tuple[Float[Array, "T E"], Int[Array, "T E"]]:
    """Returns (scores, places) of a softmax router. The logits of ids from ``experts`` on are -inf.

    A token with a NaN has NaN for all its scores, and chooses the first experts.
    """
    exp_TE = jnp.exp(logits_TE - fold_axis(jnp.max, logits_TE, 1))
    scores_TE = exp_TE / fold_axis(jnp.sum, exp_TE, 1)
    taken_key = jnp.float32(-1)
    key_TE = jnp.where(scores_TE >= 0, scores_TE, 0.0)
    key_TE = jnp.where(iota(logits_TE.shape, 1) < experts, key_TE, taken_key)

    def choose(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        key_TE, place_TE = carry
        hit_TE = mark_best(key_TE)
        return jnp.where(hit_TE, taken_key, key_TE), jnp.where(hit_TE, j, place_TE)

    none_TE = jnp.full(logits_TE.shape, k, jnp.int32)
    return scores_TE, lax.fori_loop(0, k, choose, (key_TE, none_TE))[1]


def weigh(
    scores_TE: Float[Array, "T E"], place_TE: Int[Array, "T E"], rule: Rule, renormalize: bool
) -> Array:
    """Returns the router's own weights, with 0 for experts that are not chosen."""
    weights_TE = jnp.where(place_TE < rule.k, scores_TE, 0.0)
    return weights_TE / fold_axis(jnp.sum, weights_TE, 1) if renormalize else weights_TE


def cast_votes(
    place_TE: Int[Array, "T E"], logits_TE: Float[Array, "T E"], role_T1: Int[Array, "T 1"], rule: Rule
) -> tuple[Int[Array, "1 E"], ...]:
    """Returns the rows of the table of votes.

    role_T1: 0 for padding, 1 for an exact token, 2 for a lossy one.
    """
    chosen_TE = place_TE < rule.k
    bin_TE = jnp.zeros_like(place_TE)
    if rule.method == "oea":
        bin_TE = (place_TE >= rule.k0).astype(jnp.int32)
    elif rule.method in ("affinity", "budget"):
        best_T1 = fold_axis(jnp.max, jnp.where(chosen_TE, logits_TE, -jnp.inf), 1)
        gap_TE = best_T1 - logits_TE
        for edge in edges(rule):
            bin_TE += (gap_TE >= edge).astype(jnp.int32)
    row_TE = jnp.where(role_T1 == 2, bin_TE, EXACT)
    row_TE = jnp.where(chosen_TE & (role_T1 > 0), row_TE, EXACT + 1)
    return tuple(count_true(row_TE == row, 0) for row in range(EXACT + 1))


def column(row_1E: Int[Array, "1 E"], id_R1: Int[Array, "R 1"]) -> Int[Array, "R 1"]:
    """Returns the elements ``id_R1`` of a row, as a column."""
    lane_RE = iota((id_R1.shape[0], row_1E.shape[1]), 1)
    column_R1 = fold_axis(jnp.sum, jnp.where(lane_RE == id_R1, row_1E.astype(jnp.float32), 0.0), 1)
    return column_R1.astype(jnp.int32)


def sum_over_experts(rows: Sequence[Array], block: int, term: Callable) -> Int[Array, "1 E"]:
    """Sums ``term(r, [row[r] for row in rows])``, ``[R, E]``, over all experts r, ``block`` at a time."""
    experts = rows[0].shape[1]

    def add(i: Array, sum_1E: Array) -> Array:
        id_R1 = i * block + iota((block, 1), 0)
        return sum_1E + fold_axis(jnp.sum, term(id_R1, [column(row, id_R1) for row in rows]), 0)

    return lax.fori_loop(0, experts // block, add, jnp.zeros((1, experts), jnp.int32))


def group_starts(sizes_1E: Int[Array, "1 E"], block: int) -> Int[Array, "1 E"]:
    """Returns, for each expert, how many assignments the experts of lower ids have together."""
    lane_1E = iota(sizes_1E.shape, 1)
    return sum_over_experts(
        [sizes_1E], block, lambda id_R1, size_R1: jnp.where(id_R1 < lane_1E, size_R1[0], 0)
    )


def choose_active(votes: Sequence[Int[Array, "1 E"]], rule: Rule, block: int) -> Bool[Array, "1 E"]:
    """Returns the experts that stay, as in ``reference``.

    An expert's rank is the number of experts that lead it.
    """
    bins, lane_1E = votes[:BINS], iota(votes[0].shape, 1)
    votes_1E = reduce(jnp.add, bins)

    def leads(id_R1: Array, columns: list[Array]) -> Array:
        ahead_RE = id_R1 < lane_1E
        for lane_votes_1E, row_votes_R1 in reversed(list(zip(bins, columns, strict=True))):
            more, equal = row_votes_R1 > lane_votes_1E, row_votes_R1 == lane_votes_1E
            ahead_RE = more | (equal & ahead_RE)
        return ahead_RE.astype(jnp.int32)

    union_1E, kept_1E = votes_1E > 0, jnp.zeros(lane_1E.shape, bool)
    least = jnp.int32(rule.k)
    if rule.method in ("affinity", "oea"):
        kept_1E = bins[0] > 0
    else:
        least = budget(rule, count_true(union_1E, 1))
    if rule.method == "affinity":  # a voter has k votes
        kept_1E |= union_1E & (bins[1] * rule.k == fold_axis(jnp.sum, votes_1E, 1))
    first_1E = sum_over_experts(bins, block, leads) < least
    return kept_1E | (first_1E & union_1E) | (votes[EXACT] > 0)


def remap(
    place_TE: Int[Array, "T E"],
    logits_TE: Float[Array, "T E"],
    active_1E: Bool[Array, "1 E"],
    role_T1: Int[Array, "T 1"],
    k: int,
) -> tuple[Int[Array, "T E"], Bool[Array, "T 1"]]:
    """Moves a lossy token's choices outside the active set to its best other experts inside it.

    Returns (places, whether a choice of the token moved).

    role_T1: see ``cast_votes``.
    """
    chosen_TE = place_TE < k
    moved_TE = chosen_TE & ~active_1E & (role_T1 == 2)
    lowest, none = jnp.finfo(jnp.float32).min, -jnp.inf
    key_TE = jnp.where(logits_TE != logits_TE, jnp.inf, jnp.maximum(logits_TE, lowest))
    key_TE = jnp.where(active_1E & ~chosen_TE, key_TE, none)

    def fill(_: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        key_TE, left_TE, place_TE = carry
        hit_TE, place_T1 = mark_best(key_TE), fold_axis(jnp.min, left_TE, 1)
        place_TE = jnp.where(hit_TE & (place_T1 < k), place_T1.astype(jnp.int32), place_TE)
        return jnp.where(hit_TE, none, key_TE), jnp.where(left_TE == place_T1, float(k), left_TE), place_TE

    left_TE = jnp.where(moved_TE, place_TE, k).astype(jnp.float32)
    stay_TE = jnp.where(moved_TE, k, place_TE)
    return lax.fori_loop(0, k, fill, (key_TE, left_TE, stay_TE))[2], count_true(moved_TE, 1) > 0


def reweigh(
    weights_TE: Float[Array, "T E"],
    scores_TE: Float[Array, "T E"],
    place_TE: Int[Array, "T E"],
    touched_T1: Bool[Array, "T 1"],
    k: int,
) -> Float[Array, "T E"]:
    """Returns the weights at the new places.

    A token with a moved choice gets its scores, scaled to the sum of its old weights.
    """
    kept_TE = jnp.where(place_TE < k, scores_TE, 0.0)
    total_T1 = fold_axis(jnp.sum, kept_TE, 1)
    share_TE = jnp.where(total_T1 > 0, kept_TE / jnp.where(total_T1 > 0, total_T1, 1.0), 1 / k)
    return jnp.where(touched_T1, share_TE * fold_axis(jnp.sum, weights_TE, 1), weights_TE)


def order_slots(
    place_TE: Int[Array, "T E"],
    valid_T1: Bool[Array, "T 1"],
    next_1E: Int[Array, "1 E"],
    padding: Int[Array, "1 1"],
    k: int,
) -> tuple[Int[Array, "T E"], Int[Array, "1 E"], Int[Array, "1 1"]]:
    """Returns (place of each choice in the order by expert, ``next_1E`` and ``padding`` after this tile).

    next_1E: place of each expert's next assignment.
    padding: place of the next padding token's first assignment.
    """
    t = place_TE.shape[0]
    before_TT = (iota((t, t), 1) < iota((t, t), 0)).astype(jnp.bfloat16)
    mine_TE = (place_TE < k) & valid_T1
    # 0 and 1 are exact in bfloat16, and so are their sums in float32
    earlier_TE = jnp.dot(before_TT, mine_TE.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
    off_TE = jnp.broadcast_to(~valid_T1, place_TE.shape).astype(jnp.bfloat16)
    skipped_TE = jnp.dot(before_TT, off_TE, preferred_element_type=jnp.float32)
    valid_slot_TE = next_1E + earlier_TE.astype(jnp.int32)
    padding_slot_TE = padding + skipped_TE.astype(jnp.int32) * k + place_TE
    slot_TE = jnp.where(valid_T1, valid_slot_TE, padding_slot_TE)
    return slot_TE, next_1E + count_true(mine_TE, 0), padding + count_true(~valid_T1, 0) * k
