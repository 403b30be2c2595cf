"""The expert cache inside the jitted step: a pool of slots on the device over experts in host memory.

Nothing leaves the graph: the slot table, the forecast and the choice of victims are small arrays, and a copy
is ``device_put`` of one expert's slice of the host stack into a slot of the donated pool. A layer's visit:

    gate -> forecast of the layers ahead -> missing experts are copied, first -> slots are claimed for the
    most wanted experts of the layers ahead and their copies begin -> the layer's experts run -> those
    copies land

A prefetch and the layer's computation do not depend on each other, so on a TPU the copy overlaps with the
layer: the compiler makes it ``dynamic-slice-start`` before the experts and ``-done`` after them. It does so
only for a copy that always happens, not for a conditional one. So on a TPU every layer makes as many copies
as the budget allows; a copy that no forecast wants goes to a slot that nobody reads, and its bytes count. On
other devices nothing overlaps inside a step, and only wanted experts are copied.

**Prefill, and steps that need more experts than there are slots.** A prompt uses nearly all experts, so
nothing is predicted: experts in the pool run from the pool, the layer's others stream through a buffer, one
after another. The pool stays as it is for decode.

**On a mesh** every rank has a store, a pool and a table of its own experts (``ranks``). Which of them are
needed is known before the tokens are sent, so every rank copies its missing experts before the exchange;
streamed experts are copied after it.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Int
from jmoe_kernels.grouped_mlp import ExpertWeights

from jmoe.config.counters import CACHE, names
from jmoe.mesh import DATA, EXPERT, TOKENS
from jmoe.moe.expert_leaves import weight_specs
from jmoe.moe.routing import regrouped
from jmoe.moe.types import (
    Apply,
    Computed,
    Counts,
    DispatchPlan,
    LocalExperts,
    Phase,
    Routing,
    Send,
    Traffic,
)
from jmoe.offload import table as decide
from jmoe.offload.copies import copy_in, fetch, install, stream
from jmoe.offload.ranks import SAME, TABLE, Ranks, assigned, highest, most_needed, needed_here
from jmoe.offload.slots import land, resident
from jmoe.offload.table import Moves, Rule, Table
from jmoe.offload.types import LayerSeen, Predictor, StepSeen

BEFORE = -1  # the layer number of what happens before the first layer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExpertCache:
    """What stays on the device between steps.

    table: slot table, usage and forecast of the experts.
    predictor: predictor of the experts that the next layers need.
    pool: weights of the experts on the device, ``[S + 1, ...]``; nobody reads the last slot.
    rule: eviction rule and prefetch limits.
    has_parallel_copies: whether copies overlap with compute.
    ranks: ranks that share the cache.
    """

    table: Table
    predictor: Predictor
    pool: ExpertWeights
    rule: Rule = field(metadata={"static": True})
    has_parallel_copies: bool = field(metadata={"static": True})
    ranks: Ranks = field(default=Ranks(), metadata={"static": True})

    @property
    def specs(self) -> Any:
        """How the cache is sharded over a mesh."""
        return replace(self, table=TABLE, predictor=SAME, pool=weight_specs(self.pool, TOKENS))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Visit:
    """A cache on its way through the layers of one step: the ``ExpertSource`` of the layer it is at.

    store: experts of all layers in host memory, ``[L, E, ...]``.
    cache: state of the cache at this layer.
    walk: the predictor's own state in this step; None in prefill.
    layer: number of the layer.
    pending_counts: counts of copies made before the first layer; they are added to the first layer's counts.
    ahead_TAE: scores that the routers of the next layers give to this layer's tokens, for a predictor that
        uses them.
    row_N: row of each token if this layer's tokens were shuffled.
    """

    store: ExpertWeights
    cache: ExpertCache
    walk: Any
    layer: Int[Array, ""]
    pending_counts: Counts
    ahead_TAE: Float[Array, "T A E"] | None = None
    row_N: Int[Array, " N"] | None = None

    @classmethod
    def begin(cls, store: ExpertWeights, cache: ExpertCache, seen: StepSeen | None) -> Self:
        """The visit before the first layer. seen: of a decode step; None in prefill: nothing is predicted."""
        visit = cls(store, cache, None, jnp.zeros((), jnp.int32), _counts())
        if seen is None:
            return visit
        return cache.ranks.over(cls._foreseen, (visit.specs, SAME), visit.specs)(visit, seen)

    def _foreseen(self, seen: StepSeen) -> Self:
        """The visit with the experts that the first layers are expected to need."""
        cache = self.cache
        walk, forecast = cache.predictor.start(seen)
        table = decide.foresee(cache.table, 0, cache.ranks.own_forecast(forecast, self._experts))
        table, moves = decide.prefetch(table, cache.rule, BEFORE)
        visit = replace(self._with(table._replace(slots=land(table.slots))), walk=walk)
        visit = replace(visit, pending_counts=cache.ranks.total(visit._count_prefetch(moves)))
        visit, begun = visit._begun(moves)
        return visit._landed(moves, begun)

    def end(self) -> ExpertCache:
        """The cache after the last layer."""
        if self.walk is None:
            return self.cache
        return replace(self.cache, predictor=self.cache.predictor.finish(self.walk))

    @property
    def specs(self) -> Any:
        store, cache = weight_specs(self.store, None, EXPERT), self.cache.specs
        return Visit(store, cache, SAME, SAME, SAME, PartitionSpec(TOKENS), PartitionSpec(DATA))  # pyright: ignore[reportArgumentType]

    @property
    def resident_E(self) -> Bool[Array, " E"]:
        """Whether each of this layer's experts is in a pool of the group."""
        return self.cache.ranks.all_experts(self._resident_L)

    def run(
        self,
        x_TD: Float[Array, "T D"],
        plain: Routing,
        routing: Routing,
        valid_T: Bool[Array, " T"],
        phase: Phase,
        apply: Apply,
        send: Send,
    ) -> tuple[Float[Array, "T D"], Traffic, Counts, Self]:
        """Runs this layer's experts on its tokens; returns the output, the traffic, the counts and the visit
        of the next layer."""
        ranks, e = self.cache.ranks, self._experts
        ids_TK, most = assigned(routing, valid_T), most_needed(routing.ids_TK, ranks, e)
        needed_L = needed_here(ids_TK, ranks, plain.scores_TE.shape[1], e)
        hits = jnp.sum(needed_L & self._resident_L, dtype=jnp.int32)
        misses = jnp.sum(needed_L, dtype=jnp.int32) - hits
        given = x_TD, routing, valid_T
        if phase == "prefill":
            y_TD, traffic = send(*given, self._here(apply, overflows=True))
            counts = _counts(expert_cache_hits=hits, expert_cache_misses=misses, bytes_host_to_device=misses)
            return y_TD, traffic, ranks.total(counts), replace(self, layer=self.layer + 1, row_N=None)

        scores_L = ranks.of_group(highest(plain.scores_TE, valid_T), e)
        visit = self._observe(plain, valid_T)
        useful = jnp.sum(
            decide.at(visit.cache.table.usage.fetched_X, self.layer, e) & needed_L, dtype=jnp.int32
        )
        table, missing = decide.demand(visit.cache.table, self.cache.rule, needed_L, self.layer, most)
        visit = visit._with(table)._with_pool(copy_in(self.cache.pool, self.store, missing))
        table, wishes = decide.prefetch(table, self.cache.rule, self.layer)
        visit, begun = visit._begun(wishes)
        y_TD, traffic = send(*given, visit._with(table)._here(apply, overflows=visit._slots < most))
        visit = visit._with(decide.finish_layer(table, needed_L, scores_L, self.layer))
        visit = visit._landed(wishes, begun)
        own = _counts(
            expert_cache_hits=hits, expert_cache_misses=misses, expert_cache_evictions=missing.evicted,
            bytes_host_to_device=misses, prefetch_useful_bytes=useful,
        )  # fmt: skip
        own = ranks.total(jax.tree.map(jnp.add, own, self._count_prefetch(wishes)))
        counts = jax.tree.map(jnp.add, own, self.pending_counts)
        visit = replace(visit, layer=self.layer + 1, pending_counts=_counts(), ahead_TAE=None, row_N=None)
        return y_TD, traffic, counts, visit

    @property
    def _resident_L(self) -> Bool[Array, " L"]:
        """Whether each of this rank's experts of this layer is in its pool."""
        return decide.at(resident(self.cache.table.slots), self.layer, self._experts)

    @property
    def _experts(self) -> int:
        return self.store.gate_up_E2FD.shape[1]

    @property
    def _slots(self) -> int:
        return self.cache.pool.gate_up_E2FD.shape[0] - 1

    def _with(self, table: Table) -> Self:
        return replace(self, cache=replace(self.cache, table=table))

    def _with_pool(self, pool: ExpertWeights) -> Self:
        return replace(self, cache=replace(self.cache, pool=pool))

    def _observe(self, plain: Routing, valid_T: Array) -> Self:
        ranks, predictor = self.cache.ranks, self.cache.predictor
        seen = LayerSeen(plain.scores_TE, assigned(plain, valid_T), self.ahead_TAE)
        walk, forecast = predictor.observe(self.walk, self.layer, ranks.all_rows(seen, self.row_N))
        forecast = ranks.own_forecast(forecast, self._experts)
        return replace(self._with(decide.foresee(self.cache.table, self.layer + 1, forecast)), walk=walk)

    def _begun(self, moves: Moves) -> tuple[Self, list[ExpertWeights]]:
        """Begins copies that overlap with what follows; if nothing can overlap, makes them at once.

        If they were made after the layer's experts, they would change a pool without anything that says it
        was read before: XLA:CPU would copy the whole pool in every layer.
        """
        if self.cache.has_parallel_copies:
            return self, [fetch(self.store, moves.experts_M[i]) for i in range(moves.experts_M.shape[0])]
        return self._with_pool(copy_in(self.cache.pool, self.store, moves)), []

    def _landed(self, moves: Moves, begun: list[ExpertWeights]) -> Self:
        """The visit with the begun copies installed in the pool."""
        pool = self.cache.pool
        for i, one in enumerate(begun):
            pool = install(pool, one, moves.slots_M[i])
        return self._with_pool(pool)

    def _count_prefetch(self, moves: Moves) -> Counts:
        cache = self.cache
        copied = jnp.asarray(cache.rule.copies, jnp.int32) if cache.has_parallel_copies else moves.count
        return _counts(
            expert_cache_evictions=moves.evicted, bytes_host_to_device=copied, prefetch_bytes=copied
        )

    def _here(self, apply: Apply, *, overflows: bool) -> LocalExperts:
        """This layer's experts as a transport takes them. overflows: whether the pool may lack some."""

        def combined(x_TD: Array, weights_TJ: Array, plan: DispatchPlan) -> Computed:
            return self._compute(x_TD, weights_TJ, plan, apply, overflows=overflows)

        def by_row(rows_ND: Array, group_sizes_L: Array) -> Computed:
            n = len(rows_ND)
            plan = DispatchPlan(jnp.arange(n, dtype=jnp.int32), group_sizes_L)
            return combined(rows_ND, jnp.ones((n, 1)), plan)

        return LocalExperts(self._experts, self.store.dtype, combined, by_row, apply.weigh_input)

    def _compute(
        self, x_TD: Array, weights_TK: Array, plan: DispatchPlan, apply: Apply, *, overflows: bool
    ) -> Computed:
        """Runs experts from the pool and, if ``overflows``, streams the experts that are not in it."""
        e, here_L, nowhere = self._experts, self._resident_L, self._slots + 1
        slot_L = decide.places(self.cache.table, self.layer, e, nowhere)
        pooled = regrouped(plan, slot_L, nowhere)
        y_TD = apply(x_TD, weights_TK, pooled, self.cache.pool)
        if not overflows:
            return Computed(y_TD, pooled.rows)
        away_L = (plan.group_sizes_L > 0) & ~here_L
        order_L = jnp.argsort(~away_L, stable=True).astype(jnp.int32)
        turn_L = jnp.zeros(e, jnp.int32).at[order_L].set(jnp.arange(e, dtype=jnp.int32))
        streamed = regrouped(plan, jnp.where(away_L, turn_L, e), e)
        y_TD = stream(
            self.store, self.layer * e + order_L, streamed, jnp.sum(away_L, dtype=jnp.int32),
            lambda plan, one: apply(x_TD, weights_TK, plan, one), y_TD,
        )  # fmt: skip
        return Computed(y_TD, pooled.rows + streamed.rows)


def _counts(**found: Array) -> Counts:
    """All counters of a cache; those not passed are zero."""
    return dict.fromkeys(names(CACHE), jnp.zeros((), jnp.int32)) | found
