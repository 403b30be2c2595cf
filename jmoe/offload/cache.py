"""The expert cache inside the jitted step: a pool of slots on the device over experts in host memory.

Nothing leaves the graph: the slot table, the forecast and the choice of victims are small arrays, and a copy
is ``device_put`` of one expert's slice of the host stack into a slot of the donated pool. A layer's visit:

    gate -> forecast of the layers ahead -> missing experts are copied, first -> the most wished-for experts
    of the layers ahead are claimed and their copies begin -> the layer's experts run -> those copies land

A prefetch depends on nothing that the layer computes with, so on a TPU its copy runs beside the layer: the
compiler makes it ``dynamic-slice-start`` before the experts and ``-done`` behind them. That holds for a copy
that always happens, not for one under a condition; so there the copies of a layer are as many as the budget
says, one without a wish goes to a slot that nobody reads, and its bytes count. Elsewhere nothing inside a
step runs beside it, and only what is wished for is copied.

**Prefill, and steps that need more experts than there are slots.** A prompt fires nearly all experts, so
nothing is predicted: those in the pool run from there, the layer's others stream through a buffer, one after
another. The pool stays as it is for decoding.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int
from jmoe_kernels.grouped_mlp import ExpertWeights

from jmoe.moe.routing import plan_dispatch
from jmoe.moe.types import Apply, CacheCounts, Phase, Routing
from jmoe.offload import rows
from jmoe.offload import table as decide
from jmoe.offload.copies import copy_in, fetch, install, stream
from jmoe.offload.slots import land, resident
from jmoe.offload.table import Moves, Rule, Table
from jmoe.offload.types import LayerSeen, Predictor, StepSeen

BEFORE = -1  # the layer of what happens before the first


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExpertCache:
    """What stays on the device between steps. pool: ``[S + 1, ...]``, the last slot being nobody's. beside:
    whether copies run beside compute."""

    table: Table
    predictor: Predictor
    pool: ExpertWeights
    rule: Rule = field(metadata={"static": True})
    beside: bool = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Visit:
    """A cache on its way through the layers of one step: the ``ExpertSource`` of the layer it is at.

    store: experts of all layers in host memory, ``[L, E, ...]``. walk: the predictor's own; None in prefill.
    untold: what was done before the first layer, which tells it as its own. ahead_TAE: the scores that the
    routers of the next layers give to this layer's tokens, for a predictor that wants them.
    """

    store: ExpertWeights
    cache: ExpertCache
    walk: Any
    layer: Int[Array, ""]
    untold: CacheCounts
    ahead_TAE: Float[Array, "T A E"] | None = None

    @classmethod
    def begin(cls, store: ExpertWeights, cache: ExpertCache, seen: StepSeen | None) -> Self:
        """Before the first layer. seen: of a decode step; None in prefill, which predicts nothing."""
        layer = jnp.zeros((), jnp.int32)
        if seen is None:
            return cls(store, cache, None, layer, _nothing())
        walk, forecast = cache.predictor.start(seen)
        table = decide.foresee(cache.table, 0, forecast)
        table, moves = decide.prefetch(table, cache.rule, BEFORE)
        table = table._replace(slots=land(table.slots))
        visit = cls(store, replace(cache, table=table), walk, layer, _nothing())
        visit = replace(visit, untold=visit._count_prefetch(moves))
        visit, begun = visit._begun(moves)
        return visit._landed(moves, begun)

    def end(self) -> ExpertCache:
        """The cache after the last layer."""
        if self.walk is None:
            return self.cache
        return replace(self.cache, predictor=self.cache.predictor.finish(self.walk))

    @property
    def resident_E(self) -> Bool[Array, " E"]:
        """Which of this layer's experts are in the pool."""
        return decide.at(resident(self.cache.table.slots), self.layer, self._experts)

    def run(
        self,
        x_TD: Float[Array, "T D"],
        plain: Routing,
        routing: Routing,
        valid_T: Bool[Array, " T"],
        phase: Phase,
        apply: Apply,
    ) -> tuple[Float[Array, "T D"], CacheCounts, Self]:
        """This layer's experts on its tokens, what it took, and the visit of the next layer."""
        e = self._experts
        ids_TK = rows.assigned(routing, valid_T)
        needed_E = rows.needed(ids_TK, e)
        hits = jnp.sum(needed_E & self.resident_E, dtype=jnp.int32)
        needed = jnp.sum(needed_E, dtype=jnp.int32)
        none = jnp.zeros((), jnp.int32)
        if phase == "prefill":
            y_TD = self._compute(x_TD, ids_TK, routing.weights_TK, apply, overflows=True)
            counts = CacheCounts(hits, needed - hits, none, needed - hits, none, none)
            return y_TD, counts, replace(self, layer=self.layer + 1)

        scores_E = rows.highest(plain.scores_TE, valid_T)
        chosen_TK = rows.assigned(plain, valid_T)
        visit = self._observe(LayerSeen(plain.scores_TE, chosen_TK, self.ahead_TAE))
        useful = jnp.sum(
            decide.at(visit.cache.table.usage.fetched_X, self.layer, e) & needed_E, dtype=jnp.int32
        )
        table, missing = decide.demand(
            visit.cache.table, self.cache.rule, needed_E, self.layer, min(e, ids_TK.size)
        )
        visit = visit._with(table)._with_pool(copy_in(self.cache.pool, self.store, missing))
        table, wishes = decide.prefetch(table, self.cache.rule, self.layer)
        visit, begun = visit._begun(wishes)
        overflows = visit._slots < min(e, ids_TK.size)
        y_TD = visit._with(table)._compute(x_TD, ids_TK, routing.weights_TK, apply, overflows=overflows)
        visit = visit._with(decide.finish_layer(table, needed_E, scores_E, self.layer))
        visit = visit._landed(wishes, begun)
        own = CacheCounts(hits, needed - hits, missing.evicted, needed - hits, none, useful)
        counts = jax.tree.map(lambda *parts: sum(parts), own, self._count_prefetch(wishes), self.untold)
        return y_TD, counts, replace(visit, layer=self.layer + 1, untold=_nothing(), ahead_TAE=None)

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

    def _observe(self, seen: LayerSeen) -> Self:
        walk, forecast = self.cache.predictor.observe(self.walk, self.layer, seen)
        return replace(self._with(decide.foresee(self.cache.table, self.layer + 1, forecast)), walk=walk)

    def _begun(self, moves: Moves) -> tuple[Self, list[ExpertWeights]]:
        """Copies begin beside what follows; where nothing runs beside it they are made at once.

        Made behind the layer's experts they would change a pool that nothing says was read before: XLA:CPU
        would copy all of it in every layer.
        """
        if self.cache.beside:
            return self, [fetch(self.store, moves.experts_M[i]) for i in range(moves.experts_M.shape[0])]
        return self._with_pool(copy_in(self.cache.pool, self.store, moves)), []

    def _landed(self, moves: Moves, begun: list[ExpertWeights]) -> Self:
        """With the copies that were begun in the pool."""
        pool = self.cache.pool
        for i, one in enumerate(begun):
            pool = install(pool, one, moves.slots_M[i])
        return self._with_pool(pool)

    def _count_prefetch(self, moves: Moves) -> CacheCounts:
        none, cache = jnp.zeros((), jnp.int32), self.cache
        copied = jnp.asarray(cache.rule.copies, jnp.int32) if cache.beside else moves.count
        return CacheCounts(none, none, moves.evicted, copied=copied, prefetched=copied, useful=none)

    def _compute(
        self, x_TD: Array, ids_TK: Array, weights_TK: Array, apply: Apply, *, overflows: bool
    ) -> Array:
        """From the pool, and streamed what is not in it where there may be such: ``overflows``."""
        e, slots = self._experts, self.cache.table.slots
        everyone_T = jnp.ones(len(ids_TK), bool)
        nowhere = self._slots + 1
        slot_E = jnp.where(self.resident_E, decide.at(slots.slot_X, self.layer, e), nowhere)
        y_TD = apply(x_TD, weights_TK, rows.by_slot(ids_TK, slot_E, nowhere), self.cache.pool)
        if not overflows:
            return y_TD
        away_E = rows.needed(ids_TK, e) & ~self.resident_E
        order_E = jnp.argsort(~away_E, stable=True).astype(jnp.int32)
        turn_E = jnp.zeros(e, jnp.int32).at[order_E].set(jnp.arange(e, dtype=jnp.int32))
        turn_TK = jnp.append(jnp.where(away_E, turn_E, e), jnp.int32(e))[ids_TK]
        return stream(
            self.store, self.layer * e + order_E, plan_dispatch(turn_TK, everyone_T, 0, e),
            jnp.sum(away_E, dtype=jnp.int32), lambda plan, one: apply(x_TD, weights_TK, plan, one), y_TD,
        )  # fmt: skip


def _nothing() -> CacheCounts:
    return CacheCounts(*[jnp.zeros((), jnp.int32)] * 6)
