"""Binning in jax.numpy: what the kernels must equal, and what runs if none of them can.

There are three stages, so that ranks which share the experts' weights can sum their votes between the first
and the second: ``cast_votes`` -> ``choose_active`` -> ``remap``. All numbers that decide the set are whole:
it does not depend on the order of the tokens, on padding, or on how they are split over ranks.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from jmoe_kernels.binning.types import BINS, EXACT, VOTE_ROWS, Binned, Rule
from jmoe_kernels.topk import route_softmax


def vote_bins(ids_TK: Int[Array, "T K"], logits_TE: Float[Array, "T E"], rule: Rule) -> Int[Array, "T K"]:
    """Returns the bin of each choice; bin 0 has the highest affinity.

    "popularity" and "random" have one bin, and "oea" bins by rank. The others bin by the gap to the token's
    best logit: bin b has the choices with ``b * bin_width <= gap < (b + 1) * bin_width``, and the last bin
    has no end.
    """
    if rule.method in ("popularity", "random"):
        return jnp.zeros(ids_TK.shape, jnp.int32)
    if rule.method == "oea":
        late_K = jnp.arange(ids_TK.shape[1], dtype=jnp.int32) >= rule.k0
        return jnp.broadcast_to(late_K.astype(jnp.int32), ids_TK.shape)
    logit_TK = jnp.take_along_axis(logits_TE, ids_TK, axis=1)
    gap_TK = jnp.max(logit_TK, axis=1, keepdims=True) - logit_TK
    return jnp.sum(gap_TK[..., None] >= edges(rule)[None, None], axis=-1, dtype=jnp.int32)


def edges(rule: Rule) -> np.ndarray:
    """Returns where bins 1, 2, ... begin, float32.

    All edges are above 0, so that a token's best choice is always in bin 0.
    """
    limits = np.finfo(np.float32)
    return np.arange(1, BINS, dtype=np.float32) * np.float32(
        np.clip(rule.bin_width, limits.tiny, limits.max / BINS)
    )


def cast_votes(
    ids_TK: Int[Array, "T K"],
    logits_TE: Float[Array, "T E"],
    valid_T: Bool[Array, " T"],
    lossy_T: Bool[Array, " T"],
    rule: Rule,
) -> Int[Array, "V E"]:
    """Counts the lossy tokens that chose each expert, by bin, and the exact ones, in the row ``EXACT``."""
    experts = logits_TE.shape[1]
    row_TK = jnp.where(lossy_T[:, None], vote_bins(ids_TK, logits_TE, rule), EXACT)
    flat_TK = jnp.where(valid_T[:, None], row_TK * experts + ids_TK, VOTE_ROWS * experts)
    votes = jnp.bincount(flat_TK.reshape(-1), length=VOTE_ROWS * experts)
    return votes.astype(jnp.int32).reshape(VOTE_ROWS, experts)


def budget(rule: Rule, union: Int[Array, ""]) -> Int[Array, ""]:
    """Returns how many experts of a union a budget keeps: ceil(keep * union), at least k.

    A part of 2**-22 is taken off first, so that a product that is whole in exact arithmetic is not rounded up
    to the next number.
    """
    share = union.astype(jnp.float32) * jnp.float32(rule.keep) * jnp.float32(1 - 2**-22)
    return jnp.maximum(jnp.ceil(share).astype(jnp.int32), rule.k)


def choose_active(
    votes_VE: Int[Array, "V E"], rule: Rule, draw_E: Float[Array, " E"] | None = None
) -> Bool[Array, " E"]:
    """Returns the experts that stay.

    draw_E: random numbers for method "random", which keeps the experts with the lowest ones.
    """
    votes_BE = votes_VE[:BINS]
    union_E = jnp.any(votes_BE > 0, axis=0)
    least, kept_E = jnp.int32(rule.k), jnp.zeros_like(union_E)
    if rule.method in ("affinity", "oea"):
        kept_E = votes_BE[0] > 0
    else:
        least = budget(rule, jnp.sum(union_E, dtype=jnp.int32))
    if rule.method == "affinity":
        voters = jnp.sum(votes_BE, dtype=jnp.int32) // rule.k
        kept_E |= union_E & (votes_BE[1] == voters)
    if rule.method == "random":
        assert draw_E is not None
        order_E = jnp.lexsort((draw_E, ~union_E))
    else:  # lexsort's last key counts first; ties stay in the order of the ids
        order_E = jnp.lexsort(-votes_BE[::-1])
    first_E = jnp.zeros_like(union_E).at[order_E].set(jnp.arange(union_E.shape[0]) < least)
    return kept_E | (first_E & union_E) | (votes_VE[EXACT] > 0)


def remap(
    ids_TK: Int[Array, "T K"],
    weights_TK: Float[Array, "T K"],
    logits_TE: Float[Array, "T E"],
    scores_TE: Float[Array, "T E"],
    active: Bool[Array, " E"] | Bool[Array, "T E"],
    lossy_T: Bool[Array, " T"],
) -> tuple[Int[Array, "T K"], Float[Array, "T K"]]:
    """Moves each lossy token's choices outside the active set to the token's best experts inside it.

    active: active set, ``[E]``, or one of each token, ``[T, E]``.

    Other choices stay in their places, and a token without moved choices keeps its weights bit for bit. If a
    choice moved, all of the token's weights become its scores, scaled to the sum that the weights had.
    """
    (t, k), experts = ids_TK.shape, logits_TE.shape[1]
    active_TE = jnp.broadcast_to(active if active.ndim == 2 else active[None], logits_TE.shape)
    moved_TK = ~jnp.take_along_axis(active_TE, ids_TK, axis=1) & lossy_T[:, None]
    chosen_TE = jnp.zeros((t, experts), bool).at[jnp.arange(t)[:, None], ids_TK].set(True)
    lowest = jnp.finfo(jnp.float32).min  # a logit of -inf is a candidate still; a taken expert is not
    open_TE = active_TE & ~chosen_TE
    key_TE = jnp.where(logits_TE == 0, 0.0, jnp.maximum(logits_TE, lowest))  # top_k puts -0 after 0
    _, next_TK = lax.top_k(jnp.where(open_TE, key_TE, -jnp.inf), k)
    nth_TK = jnp.maximum(jnp.cumsum(moved_TK.astype(jnp.int32), axis=1) - 1, 0)
    new_ids_TK = jnp.where(moved_TK, jnp.take_along_axis(next_TK, nth_TK, axis=1), ids_TK)
    score_TK = jnp.take_along_axis(scores_TE, new_ids_TK, axis=1)
    total_T1 = jnp.sum(score_TK, axis=1, keepdims=True)
    share_TK = jnp.where(total_T1 > 0, score_TK / jnp.where(total_T1 > 0, total_T1, 1.0), 1 / k)
    new_weights_TK = share_TK * jnp.sum(weights_TK, axis=1, keepdims=True)
    touched_T1 = jnp.any(moved_TK, axis=1, keepdims=True)
    return new_ids_TK.astype(jnp.int32), jnp.where(touched_T1, new_weights_TK, weights_TK)


def sort_by_expert(
    ids_TK: Int[Array, "T K"], valid_T: Bool[Array, " T"], experts: int
) -> tuple[Int[Array, " N"], Int[Array, " E"]]:
    """Returns (order, group sizes) of the assignments of valid tokens; those of padding come last."""
    keys_N = jnp.where(valid_T[:, None], ids_TK, experts).reshape(-1)
    sizes_E = jnp.bincount(keys_N, length=experts)
    return jnp.argsort(keys_N, stable=True).astype(jnp.int32), sizes_E.astype(jnp.int32)


def bin_experts_reference(
    logits_TE: Float[Array, "T E"],
    valid_T: Bool[Array, " T"],
    lossy_T: Bool[Array, " T"],
    rule: Rule,
    *,
    renormalize: bool,
    total: Callable[[Array], Array] | None = None,
) -> Binned:
    """Does all of it for a softmax router; see ``api.bin_experts``."""
    ids_TK, weights_TK, scores_TE = route_softmax(logits_TE, rule.k, renormalize=renormalize)
    votes_VE = cast_votes(ids_TK, logits_TE, valid_T, lossy_T, rule)
    active_E = choose_active(votes_VE if total is None else total(votes_VE), rule)
    new_ids_TK, new_weights_TK = remap(ids_TK, weights_TK, logits_TE, scores_TE, active_E, lossy_T)
    order_N, sizes_E = sort_by_expert(new_ids_TK, valid_T, logits_TE.shape[1])
    return Binned(ids_TK, weights_TK, new_ids_TK, new_weights_TK, scores_TE, active_E, order_N, sizes_E)
