"""The expert cache driven by the host: the decisions of ``offload.slot_table`` in numpy, one copy per expert.

The decisions are those of ``offload.cache``, made by the same functions in the same order. But here a copy is
a ``device_put`` by the host, and only wanted experts are copied.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax import Array
from jax.sharding import Sharding
from jmoe_kernels.grouped_mlp import ExpertWeights

from jmoe.config.counters import CACHE, names
from jmoe.offload import slot_table
from jmoe.offload.cache import BEFORE_FIRST, ExpertCache
from jmoe.offload.slot_table import Copies, SlotTable
from jmoe.offload.slots import land, resident
from jmoe.offload.types import Forecast

ROWS = {name: row for row, name in enumerate(names(CACHE))}


class HostCache:
    """The slot table and the pool during one step.

    store: experts of all layers as numpy arrays ``[L, E, ...]``.
    install: jitted function (pool, one expert, slot) -> pool, with the pool donated.
    sharding: sharding of the copies.
    counts_CL: counters of ``CACHE``, by layer.
    """

    def __init__(
        self, cache: ExpertCache, store: ExpertWeights, install: jax.stages.Wrapped, sharding: Sharding
    ):
        self.table: SlotTable = cache.table
        self.pool, self.settings = cache.pool, cache.settings
        self._store, self._install, self._sharding = store, install, sharding
        layers, self._experts = store.gate_up_E2FD.shape[:2]
        self._slots = len(self.table.slots.held_S)
        self._last_demand: tuple[int, np.ndarray, np.ndarray] | None = None
        self.counts_CL = np.zeros((len(CACHE), layers), np.int32)

    def begin(self, forecast: Forecast) -> None:
        """Starts prefetches before the first layer of a decode step.

        forecast: forecast of the first layers.
        """
        self.table = slot_table.set_forecast(self.table, 0, forecast)
        self.table, prefetches = slot_table.prefetch(self.table, self.settings, BEFORE_FIRST)
        self.table = self.table._replace(slots=land(self.table.slots))
        self._fetch_ahead(0, prefetches)

    def demand(
        self, layer: int, needed_E: np.ndarray, scores_E: np.ndarray, forecast: Forecast, max_experts: int
    ) -> None:
        """Starts to copy the experts that the layer needs and the pool lacks, as far as there are slots.

        needed_E: experts that the layer needs.
        scores_E: each expert's highest gate score.
        forecast: forecast of the layers after it.
        max_experts: largest number of experts that the step's rows can need.
        """
        hits = self._count_hits(layer, needed_E)
        self.table = slot_table.set_forecast(self.table, layer + 1, forecast)
        useful = np.sum(slot_table.at_layer(self.table.usage.fetched_X, layer, self._experts) & needed_E)
        self.table, missing = slot_table.demand(self.table, self.settings, needed_E, layer, max_experts)
        self._count(
            layer,
            expert_cache_evictions=missing.num_evictions,
            bytes_host_to_device=needed_E.sum() - hits,
            prefetch_useful_bytes=useful,
        )
        self._copy_all(missing)
        self._last_demand = layer, needed_E, scores_E

    def start_prefetches(self) -> None:
        """Starts the prefetches for the layers ahead. It is called after a layer's ``demand`` and before the
        next.

        Neither this layer nor the next layer's attention waits for them, so that the device gets that work
        first.
        """
        if self._last_demand is None:
            return
        layer, needed_E, scores_E = self._last_demand
        self._last_demand = None
        self.table, prefetches = slot_table.prefetch(self.table, self.settings, layer)
        self.table = slot_table.finish_layer(self.table, needed_E, scores_E, layer)
        self._fetch_ahead(layer, prefetches)

    def count_prefill(self, layer: int, needed_E: np.ndarray) -> None:
        """Counts the hits and copies of a prefill step's layer, which does not change the pool."""
        self._count(layer, bytes_host_to_device=needed_E.sum() - self._count_hits(layer, needed_E))

    def resident_E(self, layer: int) -> np.ndarray:
        return slot_table.at_layer(resident(self.table.slots), layer, self._experts)

    def slot_E(self, layer: int) -> np.ndarray:
        """Returns the slot of each of the layer's experts; for experts without a slot it is one past the
        spare slot."""
        return slot_table.slots_of_layer(self.table, layer, self._experts, self._slots + 1)

    def absent(self, layer: int, needed_E: np.ndarray) -> np.ndarray:
        """Returns the experts that the layer needs and the pool does not have."""
        return np.flatnonzero(needed_E & ~self.resident_E(layer))

    def stream(
        self, layer: int, experts_M: Sequence[int] | np.ndarray, run: Callable[[int, ExpertWeights], Array]
    ) -> None:
        """Runs ``run(expert, weights)`` for experts of the layer, and meanwhile copies the next expert."""
        ids = [layer * self._experts + expert for expert in experts_M]
        self._for_each(ids, lambda i, weights: run(experts_M[i], weights))

    def _for_each(self, ids: Sequence[int] | np.ndarray, run: Callable[[int, ExpertWeights], Array]) -> None:
        """Runs ``run(i, weights)`` for each expert, ``[1, ...]``; at most two are on the device at once."""
        following = [self._fetch(flat) for flat in ids[:1]]
        for i in range(len(ids)):
            weights = following.pop()
            following = [self._fetch(flat) for flat in ids[i + 1 : i + 2]]
            result = run(i, weights)
            del weights
            if i + 2 < len(ids):
                jax.block_until_ready(result)

    def rehearse(self) -> None:
        """Copies one expert into the spare slot, which no expert has, once at warm-up, to compile that."""
        self._copy_all(Copies(np.zeros(1, np.int32), np.full(1, self._slots, np.int32), 1, 0))

    def _fetch_ahead(self, layer: int, prefetches: Copies) -> None:
        """Starts prefetches, all at once, at most as many as the settings allow. They count for ``layer``."""
        self._count(
            layer,
            expert_cache_evictions=prefetches.num_evictions,
            bytes_host_to_device=prefetches.num_copies,
            prefetch_bytes=prefetches.num_copies,
        )
        fetched = [self._fetch(flat) for flat in prefetches.experts_M[: prefetches.num_copies]]
        for weights, slot in zip(fetched, prefetches.slots_M[: prefetches.num_copies], strict=True):
            self._install_at(weights, slot)

    def _copy_all(self, copies: Copies) -> None:
        experts_M = copies.experts_M[: copies.num_copies]
        self._for_each(experts_M, lambda i, weights: self._install_at(weights, copies.slots_M[i]))

    def _install_at(self, weights: ExpertWeights, slot: np.int32) -> Array:
        """Installs an expert in the slot. The pool has it as soon as its copy has landed."""
        self.pool = self._install(self.pool, weights, slot)
        return self.pool.down_EDF

    def _fetch(self, flat: int) -> ExpertWeights:
        """Starts a copy of one expert. On a CPU the result is the store's own memory."""
        layer, expert = divmod(int(flat), self._experts)
        weights = jax.tree.map(lambda stack: stack[layer, expert : expert + 1], self._store)
        return jax.device_put(weights, self._sharding, may_alias=True)

    def _count_hits(self, layer: int, needed_E: np.ndarray) -> int:
        """Counts the needed experts that are in the pool, and those that are not; returns the hits."""
        hits = int(np.sum(needed_E & self.resident_E(layer)))
        self._count(layer, expert_cache_hits=hits, expert_cache_misses=needed_E.sum() - hits)
        return hits

    def _count(self, layer: int, **amounts: int) -> None:
        for name, amount in amounts.items():
            self.counts_CL[ROWS[name], layer] += amount
