"""Capacity-aware inference: no expert, or no device, gets more of a step's assignments than its limit.

Source: He et al., "Capacity-Aware Inference" (arXiv 2503.05066). Under expert parallelism a layer takes as
long as its most loaded rank, so the highest loads are cut. The stage is pure and sees one shard:
``Routing x TokenFlags -> Routing x CapacityCounts``; it runs after routing and before dispatch, inside
``shard_map``.

**Limit.** An expert has C = ceil(factor * t * K / E) places, at least 1 and at most t, for the t valid
tokens of the shard; with scope "device" the L experts of a rank share L * C places. t and the factor
are traced, so a change of either needs no recompilation.

**Which candidates stay.** ``metric`` ranks an expert's candidates: "score" by gate weight, "order" the
earlier tokens first, "reverse_order" the later tokens first, "random" by a random number that a choice keeps
through all rounds. ``priority_T`` is compared before the metric; ties go to the earlier token, then to its
earlier choice. Exactly min(load, places) candidates stay.

**What happens to the others** (``policy``).
``drop``         they are dropped (token drop).
``reroute``      in each of ``rounds`` rounds a token offers every choice it lost to the best-scored experts
                 that have room and that it does not use yet; offers are ranked as above and fill that room.
``expand``       the L experts of the token's own shard are candidates from the start, at no cost in traffic
                 (expanded drop, section 4): J = K + L. Without expert parallelism L = E, and every expert
                 chooses C tokens. That is another method, so use this policy with several ranks.
``expert_drop``  baseline without a limit: the tenth of the experts with the least load is skipped.

Weights are those from before the cut. A rerouted or extra choice has its expert's score as weight, times the
factor that the model put on the token's own scores (1, or the renormalisation). ``renormalize`` scales a
token's remaining weights to the sum that they had before. No choice of weight 0 is added.

A lost or absent assignment has the id E, one past the last expert, and weight 0. Padding and exact tokens
pass unchanged and take no place; exact tokens count in t. Config keys: ``[moe.capacity]``
(``jmoe.config.techniques.CapacityConfig``). Counters: ``CapacityCounts``, for each token, so that they can be
summed per request. Unlike the released code, padding takes no places, and the remaining weights are
renormalised only if requested. Axes here: J choices of a token after the stage, G experts or devices that
each have a limit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from jmoe.config.techniques import CapacityConfig, Phase
from jmoe.mesh import EXPERT, TOKENS, is_single
from jmoe.moe.stage import Stage
from jmoe.moe.types import Changes, Knobs, Routing, TokenFlags


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CapacityCounts:
    """Counts of the assignments of each token that were kept, moved or dropped; padding has none.

    kept + rerouted + dropped + exact is the number of the router's choices.

    kept_T: choices that stayed under the limit.
    rerouted_T: choices moved to another expert.
    dropped_T: choices that no expert computes.
    extra_T: assignments that the policy "expand" added.
    exact_T: choices of exact tokens, which the limit does not apply to.
    """

    kept_T: Int[Array, " T"]
    rerouted_T: Int[Array, " T"]
    dropped_T: Int[Array, " T"]
    extra_T: Int[Array, " T"]
    exact_T: Int[Array, " T"]


@dataclass(frozen=True)
class ExpertShard:
    """The shard whose tokens are limited.

    first: first of its experts.
    num_experts: number L of its experts, which divides E.
    total: function that sums the loads of "expert_drop" over the shards that share a step.
    """

    first: Int[Array, ""] | int
    num_experts: int
    total: Callable[[Array], Array] = lambda load_E: load_E


@dataclass(frozen=True)
class Capacity(Stage):
    """The capacity stage of one layer."""

    table: CapacityConfig

    def acts_in(self, phase: Phase) -> bool:
        return self.table.phase in (phase, "both")

    def __call__(
        self, routing: Routing, tokens: TokenFlags, knobs: Knobs, resident_E: Array | None
    ) -> tuple[Routing, Changes]:
        """Returns the routing within the limit for this shard's tokens, and the changes."""
        limited = tokens if self.table.phase == "both" else tokens.without_decode()
        with jax.named_scope("capacity"):
            result, counts = self._limit(routing, limited, knobs)
        return result, {"dropped": counts.dropped_T, "rerouted": counts.rerouted_T}

    def _limit(self, routing: Routing, tokens: TokenFlags, knobs: Knobs) -> tuple[Routing, CapacityCounts]:
        cfg, mesh, factor = self.table, self.blueprint.mesh, knobs.value(self.table, "factor")
        held = self.blueprint.cfg.num_experts // mesh.shape[EXPERT]
        if is_single(mesh):
            return limit(routing, tokens, cfg, factor=factor, shard=ExpertShard(0, held), seed=knobs.seed)
        shard = ExpertShard(lax.axis_index(EXPERT) * held, held, partial(lax.psum, axis_name=TOKENS))
        seed = knobs.for_part(lax.axis_index(TOKENS)).seed
        return limit(routing, tokens, cfg, factor=factor, shard=shard, seed=seed)


def limit(
    routing: Routing,
    tokens: TokenFlags,
    cfg: CapacityConfig,
    *,
    factor: Float[Array | np.ndarray, ""],
    shard: ExpertShard,
    seed: Int[Array | np.ndarray, ""],
) -> tuple[Routing, CapacityCounts]:
    """Returns the routing within the limit, ``[T, K]`` or for "expand" ``[T, K + L]``, and the counts.

    factor: gamma, float32; ``cfg.factor`` is not read.
    seed: seed of the metric "random"; different for each step, layer and shard.
    """
    k, experts = routing.ids_TK.shape[1], routing.scores_TE.shape[1]
    capped_T = tokens.lossy_T
    requested_TK = _present(routing) & capped_T[:, None]
    if cfg.policy == "expert_drop":
        kept_TJ = requested_TK & ~_least_loaded(routing.ids_TK, requested_TK, experts, shard.total)
        result = _without(routing, requested_TK & ~kept_TJ)
    else:
        width = shard.num_experts if cfg.scope == "device" else 1  # experts that share a limit
        places = width * capacity(factor, jnp.sum(tokens.valid_T, dtype=jnp.int32), k, experts)
        room_G = jnp.full(experts // width, places)
        admit = AdmissionRule(tokens, cfg.metric, seed, width)
        offered = _with_local_experts(routing, capped_T, shard) if cfg.policy == "expand" else routing
        offered_TJ = _present(offered) & capped_T[:, None]
        kept_TJ = admit(offered.ids_TK, offered.weights_TK, offered_TJ, room_G)
        result = _without(offered, offered_TJ & ~kept_TJ)
        if cfg.policy == "reroute":
            result = _reroute(result, requested_TK, _scale_T(routing), room_G, admit, cfg.rounds)
    if cfg.renormalize:
        result = _rescaled(result, routing, capped_T)
    return result, _counts(routing, result, requested_TK, kept_TJ, tokens)


def capacity(
    factor: Float[Array | np.ndarray, ""], tokens: Int[Array, ""], k: int, experts: int
) -> Int[Array, ""]:
    """Returns the places of one expert: ceil(factor * tokens * k / experts), from 1 up to ``tokens``.

    The float32 computation rounds at most four times, by 2**-24 each. Subtracting a relative 2**-22 before
    the ceil keeps a product that is whole in exact arithmetic (1.1 * 80 / 8) from becoming the next integer.
    """
    even = factor * (tokens * k).astype(jnp.float32) / experts
    places = jnp.ceil(jnp.minimum(even, tokens.astype(jnp.float32)) * (1 - 2**-22)).astype(jnp.int32)
    return jnp.minimum(tokens, jnp.maximum(places, 1))


@dataclass(frozen=True)
class AdmissionRule:
    """The rule that decides who gets a place under the limit, by ``CapacityConfig.metric``.

    tokens: flags of the tokens.
    metric: order of the candidates.
    seed: seed of random orders.
    width: number of experts that share their places.
    """

    tokens: TokenFlags
    metric: str
    seed: Array | np.ndarray
    width: int

    def __call__(
        self, ids_TJ: Array, weights_TJ: Array, candidate_TJ: Array, room_G: Array
    ) -> Bool[Array, "T J"]:
        """Returns which candidates get a place: the first ``room_G`` ones of each group of ``width``
        experts."""
        (t, j), groups = ids_TJ.shape, room_G.shape[0]
        n = t * j
        group_N = jnp.where(candidate_TJ, ids_TJ // self.width, groups).reshape(n)
        keys = [group_N]
        if self.tokens.priority_T is not None:
            keys.append(jnp.broadcast_to(-self.tokens.priority_T[:, None], (t, j)).reshape(n))
        keys += [
            _rank_key(weights_TJ, self.tokens.valid_T, self.metric, self.seed).reshape(n),
            jnp.arange(n, dtype=jnp.int32),
        ]
        in_order = lax.sort(keys, num_keys=len(keys), is_stable=False)
        group_N, flat_N = in_order[0], in_order[-1]
        sizes_G = jnp.bincount(group_N, length=groups).astype(jnp.int32)
        of_group = partial(jnp.take, indices=group_N, mode="fill", fill_value=0)
        rank_N = jnp.arange(n, dtype=jnp.int32) - of_group(jnp.cumsum(sizes_G) - sizes_G)
        admitted_N = rank_N < of_group(room_G)
        return jnp.zeros(n, bool).at[flat_N].set(admitted_N, unique_indices=True).reshape(t, j)


def _rank_key(
    weights_TJ: Array, valid_T: Array, metric: str, seed: Array | np.ndarray
) -> Float[Array, "T J"]:
    """Returns the key that candidates are sorted by, lowest first. A token's place counts the valid tokens
    before it."""
    place_T = jnp.cumsum(valid_T.astype(jnp.int32)) - 1
    match metric:
        case "score":
            return -weights_TJ
        case "random":  # a counter-based draw depends only on the place, not on the padding
            return jax.random.uniform(jax.random.key(seed), weights_TJ.shape)[place_T]
    sign = {"order": 1, "reverse_order": -1}[metric]
    return jnp.broadcast_to((sign * place_T).astype(jnp.float32)[:, None], weights_TJ.shape)


def _reroute(
    routing: Routing, requested_TK: Array, scale_T: Array, room_G: Array, admit: AdmissionRule, rounds: int
) -> Routing:
    """Fills lost choices with the best-scored experts that have room.

    A group that rejected an offer stays full, so the condition "has room and is not used by the token"
    excludes every expert that was already tried.
    """
    t, k = requested_TK.shape
    experts = routing.scores_TE.shape[1]

    def lost_TK(ids_TK: Array) -> Array:
        return requested_TK & (ids_TK == experts)

    def attempt(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        turn, ids_TK, weights_TK = state
        lost = lost_TK(ids_TK)
        taken_TK = jnp.where(requested_TK & ~lost, ids_TK // admit.width, room_G.shape[0])
        left_G = room_G - jnp.bincount(taken_TK.reshape(-1), length=room_G.shape[0]).astype(jnp.int32)
        held_TE = jnp.zeros((t, experts), bool).at[jnp.arange(t)[:, None], ids_TK].set(True, mode="drop")
        open_TE = jnp.repeat(left_G > 0, admit.width)[None] & ~held_TE
        best_TK, next_TK = lax.top_k(jnp.where(open_TE, routing.scores_TE, 0.0), k)
        nth_TK = jnp.cumsum(lost.astype(jnp.int32), axis=1) - 1  # the nth lost choice takes the nth best
        score_TK = jnp.take_along_axis(best_TK, nth_TK, axis=1, mode="clip")
        offer_TK = jnp.take_along_axis(next_TK, nth_TK, axis=1, mode="clip").astype(jnp.int32)
        offer_weights_TK = score_TK * scale_T[:, None]
        admitted_TK = admit(offer_TK, offer_weights_TK, lost & (offer_weights_TK > 0), left_G)
        ids_TK = jnp.where(admitted_TK, offer_TK, ids_TK)
        return turn + 1, ids_TK, jnp.where(admitted_TK, offer_weights_TK, weights_TK)

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        return (state[0] < rounds) & jnp.any(lost_TK(state[1]))

    start = jnp.zeros((), jnp.int32), routing.ids_TK, routing.weights_TK
    _, ids_TK, weights_TK = lax.while_loop(unfinished, attempt, start)
    return routing.with_assignments(ids_TK, weights_TK)


def _with_local_experts(routing: Routing, capped_T: Array, shard: ExpertShard) -> Routing:
    """Returns the routing with the shard's own experts as further choices, unless they are already chosen."""
    experts = routing.scores_TE.shape[1]
    local_L = jnp.asarray(shard.first, jnp.int32) + jnp.arange(shard.num_experts, dtype=jnp.int32)
    score_TL = routing.scores_TE[:, local_L]
    chosen_TL = jnp.any(routing.ids_TK[:, :, None] == local_L[None, None], axis=1)
    weights_TL = score_TL * _scale_T(routing)[:, None]
    new_TL = capped_T[:, None] & ~chosen_TL & (weights_TL > 0)
    ids_TL, weights_TL = jnp.where(new_TL, local_L[None], experts), jnp.where(new_TL, weights_TL, 0.0)
    return routing.with_assignments(
        jnp.concatenate([routing.ids_TK, ids_TL], axis=1),
        jnp.concatenate([routing.weights_TK, weights_TL], axis=1),
    )


def _least_loaded(
    ids_TK: Array, requested_TK: Array, experts: int, total: Callable[[Array], Array]
) -> Bool[Array, "T K"]:
    """Returns which choices went to the least loaded tenth of the experts, at least one expert; ties go to
    the lower id."""
    keys = jnp.where(requested_TK, ids_TK, experts).reshape(-1)
    load_E = total(jnp.bincount(keys, length=experts).astype(jnp.int32))
    quiet = jnp.argsort(load_E, stable=True)[: max(1, experts // 10)]
    skipped_E = jnp.zeros(experts, bool).at[quiet].set(True)
    return jnp.take(skipped_E, ids_TK, mode="fill", fill_value=False)


def _present(routing: Routing) -> Bool[Array, "T J"]:
    return routing.ids_TK < routing.scores_TE.shape[1]


def _without(routing: Routing, dropped_TJ: Array) -> Routing:
    ids_TJ = jnp.where(dropped_TJ, routing.scores_TE.shape[1], routing.ids_TK)
    return routing.with_assignments(ids_TJ, jnp.where(dropped_TJ, 0.0, routing.weights_TK))


def _scale_T(routing: Routing) -> Float[Array, " T"]:
    """Returns the factor from a token's scores to its weights; it is 0 for a token without choices."""
    score_TK = jnp.take_along_axis(routing.scores_TE, routing.ids_TK, axis=1, mode="fill", fill_value=0)
    return _ratio(jnp.sum(routing.weights_TK, axis=1), jnp.sum(score_TK, axis=1))


def _rescaled(result: Routing, routing: Routing, capped_T: Array) -> Routing:
    """Returns the result with each limited token's weights scaled to their sum in ``routing``."""
    before_T, after_T = jnp.sum(routing.weights_TK, axis=1), jnp.sum(result.weights_TK, axis=1)
    scale_T = jnp.where(capped_T & (before_T != after_T), _ratio(before_T, after_T), 1.0)
    return result.with_assignments(result.ids_TK, result.weights_TK * scale_T[:, None])


def _ratio(numerator: Array, denominator: Array) -> Array:
    return jnp.where(denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1.0), 0.0)


def _counts(
    routing: Routing, result: Routing, requested_TK: Array, kept_TJ: Array, tokens: TokenFlags
) -> CapacityCounts:
    def count(chosen: Array) -> Array:
        return jnp.sum(chosen, axis=1, dtype=jnp.int32)

    k = requested_TK.shape[1]
    kept_T, extra_T = count(kept_TJ[:, :k]), count(kept_TJ[:, k:])
    rerouted_T = count(_present(result) & tokens.lossy_T[:, None]) - kept_T - extra_T
    exact_T = count(_present(routing) & (tokens.valid_T & ~tokens.lossy_T)[:, None])
    return CapacityCounts(kept_T, rerouted_T, count(requested_TK) - kept_T - rerouted_T, extra_T, exact_T)
