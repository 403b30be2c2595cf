"""Router logits -> Routing, composed of the steps in which model families differ.

    score -> (+ correction) -> open groups -> top-k -> weights -> (normalise) -> scale

=============  =================================================================================
softmax        Mixtral, Qwen, OLMoE, Granite, gpt-oss, DeepSeek-V2: a softmax over all experts. A softmax
               over only the chosen logits, as some write it, gives the same as normalised weights.
sigmoid        DeepSeek-V3 (arXiv 2412.19437, section 2.1.2), GLM-4.5, Llama 4: a sigmoid of each logit.
sparsemixer    Phi-3.5-MoE (arXiv 2409.12136): experts are chosen one after another, each by a softmax over
               the remaining experts that are near the best.
=============  =================================================================================

For every router, ``Routing.logits_TE`` is a token's preference for each expert: the log of the value that the
choice is made by, up to a constant per token; corrections are measured from the layer's lowest correction. An
expert outside the open groups has -inf. ``scores_TE`` is a distribution over the experts. The techniques read
only these two and therefore work with every router.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Bool, Float, Int
from jmoe_kernels.matmul import DenseKernel, linear
from jmoe_kernels.topk import route_softmax

from jmoe.config.model import ModelConfig
from jmoe.config.parts import RouterConfig
from jmoe.moe.types import DispatchPlan, Routing
from jmoe.param import ParamMaker

TINY = float(jnp.finfo(jnp.float32).tiny)


def route(
    logits_TE: Float[Array, "T E"],
    k: int,
    router: RouterConfig,
    correction_E: Float[Array, " E"] | None = None,
    expert_E: Int[Array, " E"] | None = None,
) -> Routing:
    """Chooses each token's ``k`` experts, best first; ties go to the lower expert id.

    correction_E: added to the scores for the choice only.
    expert_E: each expert's original id, by which consecutive experts form the groups; None if experts were
        not renumbered.
    """
    logits_TE = logits_TE.astype(jnp.float32)
    if router.is_plain:
        return Routing(*route_softmax(logits_TE, k, renormalize=router.norm_topk_prob), logits_TE)
    if router.scoring_func == "sparsemixer":
        ids_TK, weights_TK = sparse_mixer(logits_TE, k, router.router_jitter_noise)
        weights_TK = weigh(weights_TK, router)
        return Routing(ids_TK, weights_TK, jax.nn.softmax(logits_TE, axis=-1), logits_TE)
    scores_TE = score(logits_TE, router)
    if correction_E is None:  # compare log scores: the scores of different logits may both round to 1
        choice_TE = preference_TE = log_score(logits_TE, router)
    else:
        choice_TE = scores_TE + correction_E[None]
        # Only differences of corrections matter: their common level may be below 0 or far above the scores.
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
    """Returns each expert's share in the value that a token chooses by; forecasts of its choices use it."""
    return jax.nn.softmax(routing.logits_TE, axis=-1)


def score(logits_TE: Float[Array, "T E"], router: RouterConfig) -> Float[Array, "T E"]:
    if router.scoring_func == "sigmoid":
        return jax.nn.sigmoid(logits_TE)
    return jax.nn.softmax(logits_TE, axis=-1)


def log_score(logits_TE: Float[Array, "T E"], router: RouterConfig) -> Float[Array, "T E"]:
    """Returns the log of ``score``, computed without its rounding."""
    if router.scoring_func == "sigmoid":
        return jax.nn.log_sigmoid(logits_TE)
    return jax.nn.log_softmax(logits_TE, axis=-1)


def open_experts(
    choice_TE: Float[Array, "T E"], router: RouterConfig, expert_E: Int[Array, " E"] | None = None
) -> Bool[Array, "T E"]:
    """Returns which experts are in each token's best groups (device-limited routing, arXiv 2405.04434,
    section 2.2.2)."""
    t, experts = choice_TE.shape
    grouped_TE = choice_TE if expert_E is None else choice_TE[:, jnp.argsort(expert_E)]
    groups_TGX = grouped_TE.reshape(t, router.n_group, -1)
    best_TGX, _ = lax.top_k(groups_TGX, 2 if router.group_score == "top2" else 1)
    _, chosen = lax.top_k(jnp.sum(best_TGX, axis=-1), router.topk_group)
    open_TG = jnp.zeros((t, router.n_group), bool).at[jnp.arange(t)[:, None], chosen].set(True)
    open_TE = jnp.repeat(open_TG, experts // router.n_group, axis=1)
    return open_TE if expert_E is None else open_TE[:, expert_E]


def weigh(weights_TK: Float[Array, "T K"], router: RouterConfig) -> Float[Array, "T K"]:
    """Returns the combine weights from the scores of the chosen experts."""
    if router.norm_topk_prob:
        weights_TK = weights_TK / (jnp.sum(weights_TK, axis=-1, keepdims=True) + 1e-20)
    return weights_TK * router.routed_scaling_factor


def sparse_mixer(
    logits_TE: Float[Array, "T E"], k: int, jitter: float
) -> tuple[Int[Array, "T K"], Float[Array, "T K"]]:
    """Takes the best remaining expert, ``k`` times; returns the ids and the weights. A weight comes from a
    softmax over the remaining experts near the taken one, that is, with a relative distance from the best of
    at most ``2 * jitter``."""
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
    ids_TK: Int[Array, "T K"], valid_T: Bool[Array, " T"], first_expert: int | Array, experts: int
) -> DispatchPlan:
    """Sorts the assignments to ``experts`` consecutive experts, from ``first_expert`` on, by expert.

    Assignments of padding tokens and to other experts get the id one past the last expert, so a stable sort
    puts them at the end and the counts ignore them.
    """
    local_TK = ids_TK - first_expert
    here_TK = (local_TK >= 0) & (local_TK < experts) & valid_T[:, None]
    keys_N = jnp.where(here_TK, local_TK, experts).reshape(-1)
    n = keys_N.size
    if (experts + 1) * n > jnp.iinfo(jnp.int32).max:
        raise ValueError(f"{n} assignments to {experts} experts do not fit 32-bit sort keys")
    # On XLA:CPU, sorting one operand is ten times as fast as a stable sort of keys and positions.
    sorted_N = lax.sort(keys_N * n + jnp.arange(n, dtype=jnp.int32), is_stable=False)
    return DispatchPlan(sorted_N % n, jnp.bincount(keys_N, length=experts).astype(jnp.int32))


def regrouped(plan: DispatchPlan, group_L: Int[Array, " L"], groups: int) -> DispatchPlan:
    """Returns the plan with its groups moved to new positions, 0 to ``groups - 1``.

    group_L: new position of each group; no two groups share one, and a group at ``groups`` is left out.
    Rows move as blocks: only the groups are sorted.
    """
    sizes_L, n = plan.group_sizes_L, plan.order_N.shape[0]
    ends_L = jnp.cumsum(sizes_L, dtype=jnp.int32)
    order_L = jnp.argsort(group_L, stable=True)
    sorted_L = sizes_L[order_L]
    starts_L = jnp.zeros_like(ends_L).at[order_L].set(jnp.cumsum(sorted_L, dtype=jnp.int32) - sorted_L)
    shift_L = starts_L - (ends_L - sizes_L)
    row_N = jnp.arange(n, dtype=jnp.int32)
    group_N = jnp.searchsorted(ends_L, row_N, side="right")  # L for the rows after the last group
    to_N = row_N + jnp.append(shift_L, jnp.zeros(1, jnp.int32))[group_N]
    order_N = jnp.zeros_like(plan.order_N).at[to_N].set(plan.order_N, unique_indices=True)
    return DispatchPlan(order_N, jnp.zeros(groups, jnp.int32).at[group_L].add(sizes_L, mode="drop"))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RouterWeights:
    """The weights of one router.

    gate_ED: ``[experts, model]``.
    bias_E: added to the logits (see ``RouterConfig``).
    correction_E: added to the scores for the choice only (see ``RouterConfig``).
    expert_E: each expert's id in the checkpoint; present if the router chooses groups of experts, because
        experts may be renumbered.
    """

    gate_ED: Float[Array, "E D"]
    bias_E: Float[Array, " E"] | None = None
    correction_E: Float[Array, " E"] | None = None
    expert_E: Int[Array, " E"] | None = None


class Router(nnx.Module):
    def __init__(self, cfg: ModelConfig, make: ParamMaker):
        experts = cfg.num_experts
        self.gate_ED = make((experts, cfg.hidden_size), (None, None), has_own_dtype=True)
        self.bias_E = make((experts,), (None,)) if cfg.router.bias else None
        self.correction_E = make.float32((experts,), (None,)) if cfg.router.correction_bias else None
        self.expert_E = make.numbers(experts) if cfg.router.n_group > 1 else None

    @property
    def weights(self) -> RouterWeights:
        rest = (self.bias_E, self.correction_E, self.expert_E)
        return RouterWeights(self.gate_ED[...], *(None if p is None else p[...] for p in rest))


def router_logits(
    x_TD: Float[Array, "T D"], weights: RouterWeights, dense: DenseKernel
) -> Float[Array, "T E"]:
    logits_TE = linear(x_TD, weights.gate_ED, dense)
    if weights.bias_E is None:
        return logits_TE
    return logits_TE + weights.bias_E.astype(jnp.float32)[None]


def choose_experts(logits_TE: Float[Array, "T E"], weights: RouterWeights, cfg: ModelConfig) -> Routing:
    """Returns the router's own choice."""
    k, by = cfg.num_experts_per_tok, (weights.correction_E, weights.expert_E)
    return route(logits_TE, k, cfg.router, *by)
