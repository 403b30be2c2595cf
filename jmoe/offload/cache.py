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
from jmoe.config.techniques import Phase
from jmoe.mesh import DATA, EXPERT, TOKENS
from jmoe.moe.expert_leaves import weight_specs
from jmoe.moe.routing import regrouped
from jmoe.moe.types import Apply, Counts, DispatchPlan, ExpertOutput, LocalExperts, Routing, Send, Traffic
from jmoe.offload import slot_table
from jmoe.offload.copies import copy_in, fetch, install, stream
from jmoe.offload.ranks import SAME, TABLE, Ranks, assigned, highest, max_needed, needed_on_rank
from jmoe.offload.slot_table import CacheSettings, Copies, SlotTable
from jmoe.offload.slots import land, resident
from jmoe.offload.types import LayerView, Predictor, PredictorState, StepView

BEFORE_FIRST = -1  # the layer number of what happens before the first layer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExpertCache:
    """The state of the cache, which stays on the device between steps.

    table: slot table, usage and forecast of the experts.
    predictor: predictor of the experts that the next layers need.
    pool: weights of the experts on the device, ``[S + 1, ...]``; nobody reads the last slot.
    settings: eviction rule and prefetch limits.
    has_parallel_copies: whether copies overlap with compute.
    ranks: ranks that share the cache.
    """

    table: SlotTable
    predictor: Predictor
    pool: ExpertWeights
    settings: CacheSettings = field(metadata={"static": True})
    has_parallel_copies: bool = field(metadata={"static": True})
    ranks: Ranks = field(default=Ranks(), metadata={"static": True})

    @property
    def specs(self) -> Any:
        """The split of the cache over a mesh."""
        return replace(self, table=TABLE, predictor=SAME, pool=weight_specs(self.pool, TOKENS))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Visit:
    """The cache at one layer of a step, as that layer's ``ExpertSource``; ``run`` returns the next layer's.

    store: experts of all layers in host memory, ``[L, E, ...]``.
    cache: state of the cache at this layer.
    predictor_state: the predictor's own state in this step; None in prefill.
    layer: number of the layer.
    pending_counts: counts of copies made before the first layer; they are added to the first layer's counts.
    next_scores_TAE: scores that the routers of the next layers give to this layer's tokens, for a predictor
        that uses them.
    row_N: row of each token if this layer's tokens were shuffled.
    """

    store: ExpertWeights
    cache: ExpertCache
    predictor_state: PredictorState
    layer: Int[Array, ""]
    pending_counts: Counts
    next_scores_TAE: Float[Array, "T A E"] | None = None
    row_N: Int[Array, " N"] | None = None

    @classmethod
    def begin(cls, store: ExpertWeights, cache: ExpertCache, view: StepView | None) -> Self:
        """Begins the visit before the first layer.

        view: tokens of a decode step; None in prefill, where nothing is predicted.
        """
        visit = cls(store, cache, None, jnp.zeros((), jnp.int32), _counts())
        if view is None:
            return visit
        return cache.ranks.over(cls._prefetch_first_layers, (visit.specs, SAME), visit.specs)(visit, view)

    def _prefetch_first_layers(self, view: StepView) -> Self:
        """Returns the visit with the experts that the first layers are expected to need."""
        cache = self.cache
        predictor_state, forecast = cache.predictor.start(view)
        table = slot_table.set_forecast(cache.table, 0, cache.ranks.local_forecast(forecast, self._experts))
        table, copies = slot_table.prefetch(table, cache.settings, BEFORE_FIRST)
        visit = replace(
            self._with_table(table._replace(slots=land(table.slots))), predictor_state=predictor_state
        )
        visit = replace(visit, pending_counts=cache.ranks.total(visit._count_prefetch(copies)))
        visit, weights = visit._begin_copies(copies)
        return visit._land_copies(copies, weights)

    def end(self) -> ExpertCache:
        """Returns the cache after the last layer."""
        if self.predictor_state is None:
            return self.cache
        return replace(self.cache, predictor=self.cache.predictor.finish(self.predictor_state))

    @property
    def specs(self) -> Any:
        store, cache = weight_specs(self.store, None, EXPERT), self.cache.specs
        return Visit(store, cache, SAME, SAME, SAME, PartitionSpec(TOKENS), PartitionSpec(DATA))  # pyright: ignore[reportArgumentType]

    @property
    def next_specs(self) -> Any:
        return self.specs

    @property
    def resident_E(self) -> Bool[Array, " E"]:
        """Whether each of this layer's experts is in a pool of the group."""
        return self.cache.ranks.all_experts(self._resident_L)

    def run(
        self,
        x_TD: Float[Array, "T D"],
        plain_routing: Routing,
        routing: Routing,
        valid_T: Bool[Array, " T"],
        phase: Phase,
        apply: Apply,
        send: Send,
    ) -> tuple[Float[Array, "T D"], Traffic, Counts, Self]:
        """Runs this layer's experts on its tokens; returns the output, the traffic, the counts and the visit
        of the next layer."""
        ranks, e = self.cache.ranks, self._experts
        ids_TK, most = assigned(routing, valid_T), max_needed(routing.ids_TK, ranks, e)
        needed_L = needed_on_rank(ids_TK, ranks, plain_routing.scores_TE.shape[1], e)
        hits = jnp.sum(needed_L & self._resident_L, dtype=jnp.int32)
        misses = jnp.sum(needed_L, dtype=jnp.int32) - hits
        tokens = x_TD, routing, valid_T
        if phase == "prefill":
            y_TD, traffic = send(*tokens, self._local_experts(apply, overflows=True))
            counts = _counts(expert_cache_hits=hits, expert_cache_misses=misses, bytes_host_to_device=misses)
            return y_TD, traffic, ranks.total(counts), replace(self, layer=self.layer + 1, row_N=None)

        scores_L = ranks.group_max(highest(plain_routing.scores_TE, valid_T), e)
        visit = self._observe(plain_routing, valid_T)
        useful = jnp.sum(
            slot_table.at_layer(visit.cache.table.usage.fetched_X, self.layer, e) & needed_L, dtype=jnp.int32
        )
        table, missing = slot_table.demand(visit.cache.table, self.cache.settings, needed_L, self.layer, most)
        visit = visit._with_table(table)._with_pool(copy_in(self.cache.pool, self.store, missing))
        table, prefetches = slot_table.prefetch(table, self.cache.settings, self.layer)
        visit, weights = visit._begin_copies(prefetches)
        experts = visit._with_table(table)._local_experts(apply, overflows=visit._slots < most)
        y_TD, traffic = send(*tokens, experts)
        visit = visit._with_table(slot_table.finish_layer(table, needed_L, scores_L, self.layer))
        visit = visit._land_copies(prefetches, weights)
        counts = _counts(
            expert_cache_hits=hits, expert_cache_misses=misses, expert_cache_evictions=missing.num_evictions,
            bytes_host_to_device=misses, prefetch_useful_bytes=useful,
        )  # fmt: skip
        counts = ranks.total(jax.tree.map(jnp.add, counts, self._count_prefetch(prefetches)))
        counts = jax.tree.map(jnp.add, counts, self.pending_counts)
        visit = replace(
            visit, layer=self.layer + 1, pending_counts=_counts(), next_scores_TAE=None, row_N=None
        )
        return y_TD, traffic, counts, visit

    @property
    def _resident_L(self) -> Bool[Array, " L"]:
        """Whether each of this rank's experts of this layer is in its pool."""
        return slot_table.at_layer(resident(self.cache.table.slots), self.layer, self._experts)

    @property
    def _experts(self) -> int:
        return self.store.gate_up_E2FD.shape[1]

    @property
    def _slots(self) -> int:
        return self.cache.pool.gate_up_E2FD.shape[0] - 1

    def _with_table(self, table: SlotTable) -> Self:
        return replace(self, cache=replace(self.cache, table=table))

    def _with_pool(self, pool: ExpertWeights) -> Self:
        return replace(self, cache=replace(self.cache, pool=pool))

    def _observe(self, plain_routing: Routing, valid_T: Array) -> Self:
        ranks, predictor = self.cache.ranks, self.cache.predictor
        view = LayerView(plain_routing.scores_TE, assigned(plain_routing, valid_T), self.next_scores_TAE)
        predictor_state, forecast = predictor.observe(
            self.predictor_state, self.layer, ranks.all_rows(view, self.row_N)
        )
        forecast = ranks.local_forecast(forecast, self._experts)
        table = slot_table.set_forecast(self.cache.table, self.layer + 1, forecast)
        return replace(self._with_table(table), predictor_state=predictor_state)

    def _begin_copies(self, copies: Copies) -> tuple[Self, list[ExpertWeights]]:
        """Begins copies that overlap with later computation; if they cannot overlap, makes them at once.

        It does not make them after the layer's experts: nothing would tell XLA:CPU that the experts have read
        the pool before the copies change it, so XLA:CPU would copy the whole pool in every layer.
        """
        if self.cache.has_parallel_copies:
            return self, [fetch(self.store, copies.experts_M[i]) for i in range(copies.experts_M.shape[0])]
        return self._with_pool(copy_in(self.cache.pool, self.store, copies)), []

    def _land_copies(self, copies: Copies, weights: list[ExpertWeights]) -> Self:
        """Returns the visit with the copied ``weights`` installed in the pool."""
        pool = self.cache.pool
        for i, one in enumerate(weights):
            pool = install(pool, one, copies.slots_M[i])
        return self._with_pool(pool)

    def _count_prefetch(self, copies: Copies) -> Counts:
        cache = self.cache
        count, most = copies.num_copies, jnp.asarray(cache.settings.max_prefetches, jnp.int32)
        count = most if cache.has_parallel_copies else count
        return _counts(
            expert_cache_evictions=copies.num_evictions, bytes_host_to_device=count, prefetch_bytes=count
        )

    def _local_experts(self, apply: Apply, *, overflows: bool) -> LocalExperts:
        """Returns this layer's experts as a transport takes them.

        overflows: whether the pool may lack some.
        """

        def run_tokens(x_TD: Array, weights_TJ: Array, plan: DispatchPlan) -> ExpertOutput:
            return self._compute(x_TD, weights_TJ, plan, apply, overflows=overflows)

        def run_rows(rows_ND: Array, group_sizes_L: Array) -> ExpertOutput:
            n = len(rows_ND)
            plan = DispatchPlan(jnp.arange(n, dtype=jnp.int32), group_sizes_L)
            return run_tokens(rows_ND, jnp.ones((n, 1)), plan)

        return LocalExperts(self._experts, self.store.dtype, run_tokens, run_rows, apply.weigh_input)

    def _compute(
        self, x_TD: Array, weights_TK: Array, plan: DispatchPlan, apply: Apply, *, overflows: bool
    ) -> ExpertOutput:
        """Runs experts from the pool and, if ``overflows``, streams the experts that are not in it."""
        e, resident_L, no_slot = self._experts, self._resident_L, self._slots + 1
        slot_L = slot_table.slots_of_layer(self.cache.table, self.layer, e, no_slot)
        pooled = regrouped(plan, slot_L, no_slot)
        y_TD = apply(x_TD, weights_TK, pooled, self.cache.pool)
        if not overflows:
            return ExpertOutput(y_TD, pooled.num_rows)
        absent_L = (plan.group_sizes_L > 0) & ~resident_L
        order_L = jnp.argsort(~absent_L, stable=True).astype(jnp.int32)
        turn_L = jnp.zeros(e, jnp.int32).at[order_L].set(jnp.arange(e, dtype=jnp.int32))
        streamed = regrouped(plan, jnp.where(absent_L, turn_L, e), e)
        y_TD = stream(
            self.store, self.layer * e + order_L, streamed, jnp.sum(absent_L, dtype=jnp.int32),
            lambda plan, weights: apply(x_TD, weights_TK, plan, weights), y_TD,
        )  # fmt: skip
        return ExpertOutput(y_TD, pooled.num_rows + streamed.num_rows)


def _counts(**found: Array) -> Counts:
    """Returns all counters of a cache; those not passed are zero."""
    return dict.fromkeys(names(CACHE), jnp.zeros((), jnp.int32)) | found
