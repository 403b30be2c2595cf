"""The runner of offloaded experts that drives each layer from the host.

The other executor decides and copies inside one jitted step (``offload.cache``). Here a step is a few jitted
parts per layer. Between them the host waits once, to learn which experts the layer needs, decides in numpy
and starts copies. They are ordinary copies and run in parallel with compute on any device that can do that.
"""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, SingleDeviceSharding
from jmoe_kernels.grouped_mlp import ExpertWeights

from jmoe.engine.offload.host_cache import HostCache
from jmoe.engine.offload.host_parts import parts_of
from jmoe.engine.offload.host_types import Rows, Seen, Work, forecast_of
from jmoe.engine.step.functions import WindowRouting
from jmoe.engine.step.inputs import Sizes, StepInput
from jmoe.engine.step.runner import Runner
from jmoe.engine.step.sampling import Sampled
from jmoe.mesh import sharding
from jmoe.models.decoder import Decoder
from jmoe.moe.types import Changes, Computed, Knobs
from jmoe.nn.sequences import Sequences
from jmoe.offload.cache import ExpertCache


class HostDrivenRunner(Runner):
    """A ``Runner`` with the same answers and the same counts; its ``cache.table`` has numpy arrays."""

    cache: ExpertCache

    def __init__(
        self, model: Decoder, mesh: Mesh, sizes: Sizes, tables: None = None, cache: ExpertCache | None = None
    ):
        if cache is None or tables is not None:
            raise ValueError("moe.offload.executor = 'host' needs offloaded experts and shuffles no tokens")
        cache = replace(cache, table=jax.tree.map(np.asarray, cache.table))
        super().__init__(model, mesh, sizes, tables, cache)
        slots = len(cache.table.slots.held_S)
        layers, experts = len(model.cfg.moe_layers), model.cfg.num_experts
        self._parts = parts_of(model, self._jitted.merge, slots)
        self._layers = [jax.tree.leaves(nnx.state(layer)) for layer in model.layers]
        self._ahead = [model.routers_after(i) for i in range(len(model.layers))]
        self._store: Any = jax.tree.map(np.asarray, model.store.weights)
        self._where = SingleDeviceSharding(mesh.devices.item())
        numbers = [np.int32(i) for i in range(max(layers, experts))]
        self._numbers = jax.device_put(numbers, sharding(mesh))  # on the device before a part needs one
        self._asks_pool = model.moe.binning is not None and model.moe.binning.resident_bonus > 0
        self._rehearsing = False

    def _step(self, given: StepInput, knobs: Knobs | None) -> tuple[Sampled, Array, Changes | None]:
        cache, phase = self._host_cache(), given.phase
        rows, seqs, layers, walk = self._through(given, cache, knobs, predicts=phase == "decode")
        sampled, hidden, changes, self._latest_S, self._totals[phase], predictor = self._parts.finish(
            self.weights, rows, seqs, given, self._latest_S, layers, cache.counts_CL, self._totals[phase],
            self.cache.predictor, walk,
        )  # fmt: skip
        self.cache = replace(self.cache, table=cache.table, predictor=predictor, pool=cache.pool)
        return sampled, hidden, changes

    def window_logits(self, tokens_BT: np.ndarray, positions_BT: np.ndarray) -> np.ndarray:
        given = Sequences(*jax.device_put((tokens_BT, positions_BT)))
        rows, seqs, _, _ = self._through(given, self._host_cache(), None, predicts=False)
        return np.asarray(self._parts.window_logits(self.weights, rows, seqs))

    def window_routing(
        self, tokens_BT: np.ndarray, positions_BT: np.ndarray, picks_BM: np.ndarray
    ) -> WindowRouting:
        given = Sequences(*jax.device_put((tokens_BT, positions_BT)))
        _, seqs, layers, _ = self._through(given, self._host_cache(), None, predicts=False)
        plain = [each.plain for each in layers if each.plain is not None]
        return jax.device_get(self._parts.window_routing(self.weights, seqs, picks_BM, plain))

    def close(self) -> None:
        super().close()
        self._layers, self._ahead, self._store = [], [], None

    def _through(
        self, given: StepInput | Sequences, cache: HostCache, knobs: Knobs | None, *, predicts: bool
    ) -> tuple[Rows, Sequences, list[Seen], object]:
        """Runs all layers; returns the rows, the sequences on the device, what each layer keeps for the end
        of the step, and the predictor's walk.

        given: ``Sequences`` for windows without page tables; the pages do not change.
        predicts: whether this is a decode step, which fills the pool; else the pool does not change.
        """
        predictor = self.cache.predictor if predicts else None
        knobs = jax.device_put(knobs, sharding(self.mesh))
        rows, by, seqs, walk, told_RE = self._parts.begin(
            self.weights, given, self._latest_S, knobs, predictor
        )
        if predicts:
            cache.begin(forecast_of(np.asarray(told_RE)))
        layers = []
        for i, (weights, run) in enumerate(zip(self._layers, self._parts.layers, strict=True)):
            pages = None if seqs.table_BM is None else self.pages[i]
            nth = len(layers)  # index among the layers with experts
            if i in self.cfg.mlp_only_layers:
                rows, pages = run(weights, rows, by, seqs, pages)
            else:
                here_E, ahead = self._here(cache, nth), self._ahead[i] if predicts else None
                attended, pages = run(
                    weights, self._numbers[nth], rows, by, seqs, pages, knobs, here_E, predictor, walk, ahead
                )
                cache.settle()
                walk, told_RE = attended.walk, np.asarray(attended.told_RE)
                y_ND, computed = self._experts(nth, attended.work, told_RE, cache, predicts=predicts)
                rows = Rows(attended.x_ND, y_ND)
                layers.append(attended.seen._replace(computed=computed))
            if pages is not None:
                self.pages[i] = pages
        cache.settle()
        return rows, seqs, layers, walk

    def _experts(
        self, layer: int, work: Work, told_RE: np.ndarray, cache: HostCache, *, predicts: bool
    ) -> Computed:
        """Runs a layer's experts: those in the pool, and those that are streamed because it lacks them."""
        needed_E = told_RE[0] > 0
        if predicts:
            most = min(self.cfg.num_experts, work.ids_TK.size)
            cache.demand(layer, needed_E, told_RE[1], forecast_of(told_RE[2:]), most)
        else:
            cache.pass_by(layer, needed_E)
        done: Computed = self._parts.pooled(work, cache.slot_E(layer), cache.pool)

        def add(expert: int, one: ExpertWeights) -> Array:
            nonlocal done
            done = self._parts.streamed(done, work, self._numbers[expert], one)
            return done.y_ND

        cache.stream(layer, [0] if self._rehearsing else cache.away(layer, needed_E), add)
        return done

    def _here(self, cache: HostCache, layer: int) -> np.ndarray | None:
        """Which of the layer's experts are in the pool; None unless routing depends on that."""
        if not self._asks_pool:
            return None
        cache.settle()
        return cache.resident_E(layer)

    def _host_cache(self) -> HostCache:
        return HostCache(self.cache, self._store, self._parts.install, self._where)

    def _rehearse(self, given: StepInput) -> Array:
        """Also copies one expert to the spare slot and streams one, because padding needs no experts."""
        self._rehearsing = True
        hidden = super()._rehearse(given)
        self._rehearsing = False
        cache = self._host_cache()
        cache.rehearse()
        self.cache = replace(self.cache, pool=cache.pool)
        return hidden
