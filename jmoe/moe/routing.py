"""Router logits -> Routing, composed of the pieces that model families differ in.

    score -> (+ correction) -> open groups -> top-k -> weights -> (normalise) -> scale

=============  =================================================================================
softmax        Mixtral, Qwen, OLMoE, Granite, gpt-oss, DeepSeek-V2: over all experts. A softmax over
               the chosen logits alone, as some write it, is the same with normalised weights.
sigmoid        DeepSeek-V3 (arXiv 2412.19437, section 2.1.2), GLM-4.5, Llama 4: of each expert alone.
sparsemixer    Phi-3.5-MoE (arXiv 2409.12136): one expert after another, each by a softmax over those left
               that are near the best.
=============  =================================================================================

Whatever the router, ``Routing.logits_TE`` is how much a token prefers each expert, the log of what it is
chosen by, up to a constant of the token; corrections count from the least one of the layer. An expert outside
the open groups is least preferred. ``scores_TE`` is a distribution over the experts. The techniques read
these two alone, and so work with every router.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int
from jmoe_kernels.binning import route_softmax

from jmoe.config.anatomy import RouterConfig
from jmoe.moe.types import DispatchPlan, Routing

TINY = float(jnp.finfo(jnp.float32).tiny)


def route(
    logits_TE: Float[Array, "T E"],
    k: int,
    router: RouterConfig,
    correction_E: Float[Array, " E"] | None = None,
    expert_E: Int[Array, " E"] | None = None,
) -> Routing:
    """Each token's ``k`` experts, best first; ties go to the lower expert id.

    correction_E: added to the scores to choose by. expert_E: what each expert was called when the groups were
    made, of consecutive ones; None is what it is called now.
    """
    logits_TE = logits_TE.astype(jnp.float32)
    if router.is_plain:
        return Routing(*route_softmax(logits_TE, k, renormalize=router.norm_topk_prob), logits_TE)
    if router.scoring_func == "sparsemixer":
        ids_TK, weights_TK = sparse_mixer(logits_TE, k, router.router_jitter_noise)
        weights_TK = weigh(weights_TK, router)
        return Routing(ids_TK, weights_TK, jax.nn.softmax(logits_TE, axis=-1), logits_TE)
    scores_TE = score(logits_TE, router)
    if correction_E is None:  # what scores rise with: they may have reached 1 where logits differ
        choice_TE = preference_TE = log_score(logits_TE, router)
    else:
        choice_TE = scores_TE + correction_E[None]
        # Only differences of corrections say anything: a level of theirs may be below 0, or dwarf the scores.
        preference_TE = jnp.log(jnp.maximum(choice_TE - jnp.min(correction_E), TINY))
    if router.n_group > 1:
        by_TE = scores_TE if correction_E is None else choice_TE
        open_TE = open_experts(by_TE, router, expert_E)
        choice_TE, preference_TE = (jnp.where(open_TE, a, -jnp.inf) for a in (choice_TE, preference_TE))
    _, ids_TK = lax.top_k(choice_TE, k)
    weights_TK = weigh(jnp.take_along_axis(scores_TE, ids_TK, axis=1), router)
    total_T1 = jnp.maximum(jnp.sum(scores_TE, axis=-1, keepdims=True), TINY)
    return Routing(ids_TK.astype(jnp.int32), weights_TK, scores_TE / total_T1, preference_TE)


def likely(routing: Routing) -> Float[Array, "T E"]:
    """The share of each expert in what a token chooses by: what a forecast of its choices goes by."""
    return jax.nn.softmax(routing.logits_TE, axis=-1)


def score(logits_TE: Float[Array, "T E"], router: RouterConfig) -> Float[Array, "T E"]:
    if router.scoring_func == "sigmoid":
        return jax.nn.sigmoid(logits_TE)
    return jax.nn.softmax(logits_TE, axis=-1)


def log_score(logits_TE: Float[Array, "T E"], router: RouterConfig) -> Float[Array, "T E"]:
    """Of ``score``, without its rounding."""
    if router.scoring_func == "sigmoid":
        return jax.nn.log_sigmoid(logits_TE)
    return jax.nn.log_softmax(logits_TE, axis=-1)


def open_experts(
    choice_TE: Float[Array, "T E"], router: RouterConfig, expert_E: Int[Array, " E"] | None = None
) -> Bool[Array, "T E"]:
    """The experts of each token's best groups (device-limited routing, arXiv 2405.04434, section 2.2.2)."""
    t, experts = choice_TE.shape
    grouped_TE = choice_TE if expert_E is None else choice_TE[:, jnp.argsort(expert_E)]
    groups_TGX = grouped_TE.reshape(t, router.n_group, -1)
    best_TGX, _ = lax.top_k(groups_TGX, 2 if router.group_score == "top2" else 1)
    _, chosen = lax.top_k(jnp.sum(best_TGX, axis=-1), router.topk_group)
    open_TG = jnp.zeros((t, router.n_group), bool).at[jnp.arange(t)[:, None], chosen].set(True)
    open_TE = jnp.repeat(open_TG, experts // router.n_group, axis=1)
    return open_TE if expert_E is None else open_TE[:, expert_E]


def weigh(weights_TK: Float[Array, "T K"], router: RouterConfig) -> Float[Array, "T K"]:
    """The scores of the chosen as combine weights."""
    if router.norm_topk_prob:
        weights_TK = weights_TK / (jnp.sum(weights_TK, axis=-1, keepdims=True) + 1e-20)
    return weights_TK * router.routed_scaling_factor


def sparse_mixer(
    logits_TE: Float[Array, "T E"], k: int, jitter: float
) -> tuple[Int[Array, "T K"], Float[Array, "T K"]]:
    """(ids, weights): the best expert left, ``k`` times, each weighed by a softmax over those left that are
    near it: whose relative distance from the best is at most ``2 * jitter``."""
    rows_T = jnp.arange(logits_TE.shape[0])
    left_TE, ids, weights = logits_TE, [], []
    for _ in range(k):
        best_T1 = jnp.max(left_TE, axis=-1, keepdims=True)
        far_TE = (best_T1 - logits_TE) / jnp.maximum(jnp.abs(logits_TE), best_T1) > 2 * jitter
        id_T = jnp.argmax(left_TE, axis=-1)
        near_TE = jax.nn.softmax(jnp.where(far_TE, -jnp.inf, left_TE), axis=-1)
        ids.append(id_T.astype(jnp.int32))
        weights.append(near_TE[rows_T, id_T])
        left_TE = left_TE.at[rows_T, id_T].set(-jnp.inf)
    return jnp.stack(ids, axis=1), jnp.stack(weights, axis=1)


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


def regrouped(plan: DispatchPlan, place_L: Int[Array, " L"], groups: int) -> DispatchPlan:
    """The plan with its groups in other places, 0 to ``groups - 1``; one past the last is none of them.

    place_L: of each group, no two in one place. Rows move as blocks: nothing is sorted but the groups.
    """
    sizes_L, n = plan.group_sizes_L, plan.order_N.shape[0]
    ends_L = jnp.cumsum(sizes_L, dtype=jnp.int32)
    order_L = jnp.argsort(place_L, stable=True)
    sorted_L = sizes_L[order_L]
    starts_L = jnp.zeros_like(ends_L).at[order_L].set(jnp.cumsum(sorted_L, dtype=jnp.int32) - sorted_L)
    shift_L = starts_L - (ends_L - sizes_L)
    row_N = jnp.arange(n, dtype=jnp.int32)
    group_N = jnp.searchsorted(ends_L, row_N, side="right")  # L for the rows behind the last group
    to_N = row_N + jnp.append(shift_L, jnp.zeros(1, jnp.int32))[group_N]
    order_N = jnp.zeros_like(plan.order_N).at[to_N].set(plan.order_N, unique_indices=True)
    return DispatchPlan(order_N, jnp.zeros(groups, jnp.int32).at[place_L].add(sizes_L, mode="drop"))
