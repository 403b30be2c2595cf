"""The expert cache as the host drives it: the decisions of ``offload.table`` in numpy, one copy an expert.

They are those of ``offload.cache``, made by the same functions in the same order. What differs is that a copy
is a ``device_put`` from here, and that one without a wish is never made.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import jax
import numpy as np
from jmoe_kernels.grouped_mlp import ExpertWeights

from jmoe.moe.types import CacheCounts
from jmoe.offload import table as decide
from jmoe.offload.cache import BEFORE, ExpertCache
from jmoe.offload.slots import land, resident
from jmoe.offload.table import Moves, Table
from jmoe.offload.types import Forecast


class HostCache:
    """The slot table and the pool during one step.

    store: experts of all layers as numpy arrays ``[L, E, ...]``. install: (pool, one expert, slot) -> pool,
    jitted, with the pool donated. where: the device. counts_CL: the fields of ``CacheCounts``, by layer.
    """

    def __init__(self, cache: ExpertCache, store: ExpertWeights, install: jax.stages.Wrapped, where: Any):
        self.table: Table = cache.table
        self.pool, self.rule = cache.pool, cache.rule
        self._store, self._install, self._where = store, install, where
        layers, self._experts = store.gate_up_E2FD.shape[:2]
        self._slots = len(self.table.slots.held_S)
        self._unsettled: tuple[int, np.ndarray, np.ndarray] | None = None
        self.counts_CL = np.zeros((len(fields(CacheCounts)), layers), np.int32)

    def begin(self, forecast: Forecast) -> None:
        """Before the first layer of a decode step."""
        self.table = decide.foresee(self.table, 0, forecast)
        self.table, wishes = decide.prefetch(self.table, self.rule, BEFORE)
        self.table = self.table._replace(slots=land(self.table.slots))
        self._wish(0, wishes)

    def demand(
        self, layer: int, needed_E: np.ndarray, scores_E: np.ndarray, forecast: Forecast, most: int
    ) -> None:
        """What the layer needs is in the pool or on its way there, as far as there are slots.

        scores_E: as its gate scored at most. forecast: of the layers behind it. most: experts that the step's
        rows can need.
        """
        hits = self._meet(layer, needed_E)
        self.table = decide.foresee(self.table, layer + 1, forecast)
        useful = np.sum(decide.at(self.table.usage.fetched_X, layer, self._experts) & needed_E)
        self.table, missing = decide.demand(self.table, self.rule, needed_E, layer, most)
        self._count(layer, evicted=missing.evicted, copied=needed_E.sum() - hits, useful=useful)
        self._copy(missing)
        self._unsettled = layer, needed_E, scores_E

    def settle(self) -> None:
        """Behind a layer's demand and before the next: what the layers ahead will need is on its way.

        Nothing that the layer, or the next one's attention, computes waits for this, so that the device is
        given them first.
        """
        if self._unsettled is None:
            return
        layer, needed_E, scores_E = self._unsettled
        self._unsettled = None
        self.table, wishes = decide.prefetch(self.table, self.rule, layer)
        self.table = decide.finish_layer(self.table, needed_E, scores_E, layer)
        self._wish(layer, wishes)

    def pass_by(self, layer: int, needed_E: np.ndarray) -> None:
        """A layer of a prompt, which leaves the pool as it is."""
        self._count(layer, copied=needed_E.sum() - self._meet(layer, needed_E))

    def resident_E(self, layer: int) -> np.ndarray:
        return decide.at(resident(self.table.slots), layer, self._experts)

    def slot_E(self, layer: int) -> np.ndarray:
        """The slots of the layer's experts, one past nobody's for those that have none."""
        slot_E = decide.at(self.table.slots.slot_X, layer, self._experts)
        return np.where(self.resident_E(layer), slot_E, np.int32(self._slots + 1))

    def away(self, layer: int, needed_E: np.ndarray) -> np.ndarray:
        """Experts of the layer that it needs and the pool does not have."""
        return np.flatnonzero(needed_E & ~self.resident_E(layer))

    def arriving(self, layer: int, experts_M: Sequence[int] | np.ndarray) -> Iterator[ExpertWeights]:
        """Experts of a layer, see ``_arriving``."""
        return self._arriving(layer * self._experts + np.asarray(experts_M, np.int32))

    def _arriving(self, flats: np.ndarray) -> Iterator[ExpertWeights]:
        """Experts ``[1, ...]`` on the device one by one, the copy of the next begun before one is given away.

        Two are there at once, provided that who takes them waits for one's work before asking for the next.
        """
        following = [self._fetch(flat) for flat in flats[:1]]
        for i in range(len(flats)):
            one = following.pop()
            following = [self._fetch(flat) for flat in flats[i + 1 : i + 2]]
            yield one

    def rehearse(self) -> None:
        """An expert into nobody's slot, for what that compiles."""
        self._copy(Moves(np.zeros(1, np.int32), np.full(1, self._slots, np.int32), 1, 0))

    def _wish(self, layer: int, wishes: Moves) -> None:
        """Copies ahead of need, told by ``layer`` as its own."""
        self._count(layer, evicted=wishes.evicted, copied=wishes.count, prefetched=wishes.count)
        self._copy(wishes)

    def _copy(self, moves: Moves) -> None:
        """Begins the copies of ``moves``; the pool has them when they have landed."""
        count = int(moves.count)
        for i, one in enumerate(self._arriving(moves.experts_M[:count])):
            self.pool = self._install(self.pool, one, moves.slots_M[i])
            if i + 2 < count:  # else nothing is fetched any more
                jax.block_until_ready(self.pool)

    def _fetch(self, flat: int) -> ExpertWeights:
        layer, expert = divmod(int(flat), self._experts)
        one = jax.tree.map(lambda stack: stack[layer, expert : expert + 1], self._store)
        return jax.device_put(one, self._where, may_alias=True)  # on a CPU nothing is copied here

    def _meet(self, layer: int, needed_E: np.ndarray) -> int:
        """Counts the experts needed that are there."""
        hits = int(np.sum(needed_E & self.resident_E(layer)))
        self._count(layer, hits=hits, misses=needed_E.sum() - hits)
        return hits

    def _count(self, layer: int, **amounts: int) -> None:
        for i, field in enumerate(fields(CacheCounts)):
            self.counts_CL[i, layer] += amounts.get(field.name, 0)
