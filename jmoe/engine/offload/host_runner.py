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
from jmoe.engine.offload.host_types import HostJourney, HostState, Passed, Rows, Seen, Work, forecast_of
from jmoe.engine.step.functions import WindowRouting
from jmoe.engine.step.inputs import Sizes, StepInput
from jmoe.engine.step.runner import Runner
from jmoe.engine.step.state import StepOutput
from jmoe.mesh import sharding
from jmoe.models.decoder import Decoder
from jmoe.models.journey import StepSettings
from jmoe.moe.orders import ShuffleTables
from jmoe.moe.types import Computed, Knobs
from jmoe.nn.sequences import Sequences
from jmoe.offload.cache import ExpertCache


class HostDrivenRunner(Runner):
    """A ``Runner`` with the same answers and the same counts; its ``cache.table`` has numpy arrays."""

    def __init__(
        self,
        model: Decoder,
        mesh: Mesh,
        sizes: Sizes,
        tables: list[ShuffleTables] | None = None,
        cache: ExpertCache | None = None,
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

    @property
    def _cache(self) -> ExpertCache:
        assert self.state.cache is not None, "a runner of offloaded experts has a cache until it is closed"
        return self.state.cache

    def _step(self, inputs: StepInput, settings: StepSettings) -> StepOutput:
        cache, phase = self._host_cache(), inputs.phase
        passed = self._through(inputs, cache, settings.knobs, predicts=phase == "decode")
        state = HostState(self.state.totals[phase], self.state.latest_S, self._cache.predictor)
        state, output = self._parts.finish(self.weights, state, inputs, passed, cache.counts_CL)
        kept = replace(self._cache, table=cache.table, predictor=state.predictor, pool=cache.pool)
        totals = self.state.totals | {phase: state.totals}
        self.state = replace(self.state, totals=totals, latest_S=state.latest_S, cache=kept)
        return output

    def window_logits(self, tokens_BT: np.ndarray, positions_BT: np.ndarray) -> np.ndarray:
        passed = self._through_window(tokens_BT, positions_BT)
        return np.asarray(self._parts.window_logits(self.weights, passed.rows, passed.seqs))

    def window_routing(
        self, tokens_BT: np.ndarray, positions_BT: np.ndarray, picks_BM: np.ndarray
    ) -> WindowRouting:
        passed = self._through_window(tokens_BT, positions_BT)
        plain = [each.plain for each in passed.layers if each.plain is not None]
        return jax.device_get(self._parts.window_routing(self.weights, passed.seqs, picks_BM, plain))

    def close(self) -> None:
        super().close()
        self._layers, self._ahead, self._store = [], [], None

    def _through_window(self, tokens_BT: np.ndarray, positions_BT: np.ndarray) -> Passed:
        seqs = Sequences(*jax.device_put((tokens_BT, positions_BT)))
        return self._through(seqs, self._host_cache(), None, predicts=False)

    def _through(
        self, inputs: StepInput | Sequences, cache: HostCache, knobs: Knobs | None, *, predicts: bool
    ) -> Passed:
        """Runs all layers.

        inputs: ``Sequences`` for windows without page tables; the pages do not change.
        predicts: whether this is a decode step, which fills the pool; else the pool does not change.
        """
        predictor = self._cache.predictor if predicts else None
        knobs = jax.device_put(knobs, sharding(self.mesh))
        begun = self._parts.begin(self.weights, inputs, self.state.latest_S, knobs, predictor)
        if predicts:
            cache.begin(forecast_of(np.asarray(begun.forecast_RE)))
        rows, seqs, walk = begun.rows, begun.seqs, begun.walk
        layers: list[Seen] = []
        for i, (weights, run) in enumerate(zip(self._layers, self._parts.layers, strict=True)):
            layer = len(layers)  # index among the layers with experts
            pages = None if seqs.table_BM is None else self.state.pages[i]
            args = weights, rows, begun.rotation, seqs, pages
            if i in self.cfg.mlp_only_layers:
                rows, pages = run(*args)
            else:
                ahead = self._ahead[i] if predicts else None
                resident_E = self._resident(cache, layer)
                journey = HostJourney(self._numbers[layer], knobs, resident_E, predictor, walk, ahead)
                attended, pages = run(*args, journey)
                cache.settle()
                walk, news_RE = attended.walk, np.asarray(attended.news_RE)
                y_ND, computed = self._experts(layer, attended.work, news_RE, cache, predicts=predicts)
                rows = Rows(attended.x_ND, y_ND)
                layers.append(attended.seen._replace(computed=computed))
            if pages is not None:
                self.state.pages[i] = pages
        cache.settle()
        return Passed(rows, seqs, layers, walk)

    def _experts(
        self, layer: int, work: Work, news_RE: np.ndarray, cache: HostCache, *, predicts: bool
    ) -> Computed:
        """Runs a layer's experts: those in the pool, and those that are streamed because it lacks them."""
        needed_E = news_RE[0] > 0
        if predicts:
            most = min(self.cfg.num_experts, work.ids_TK.size)
            cache.demand(layer, needed_E, news_RE[1], forecast_of(news_RE[2:]), most)
        else:
            cache.pass_by(layer, needed_E)
        done: Computed = self._parts.pooled(work, cache.slot_E(layer), cache.pool)

        def add(expert: int, one: ExpertWeights) -> Array:
            nonlocal done
            done = self._parts.streamed(done, work, self._numbers[expert], one)
            return done.y_ND

        cache.stream(layer, [0] if self._rehearsing else cache.away(layer, needed_E), add)
        return done

    def _resident(self, cache: HostCache, layer: int) -> Any:
        """Which of the layer's experts are in the pool; None unless routing depends on that."""
        if not self._asks_pool:
            return None
        cache.settle()
        return cache.resident_E(layer)

    def _host_cache(self) -> HostCache:
        return HostCache(self._cache, self._store, self._parts.install, self._where)

    def _rehearse(self, inputs: StepInput) -> Array:
        """Also copies one expert to the spare slot and streams one, because padding needs no experts."""
        self._rehearsing = True
        hidden = super()._rehearse(inputs)
        self._rehearsing = False
        cache = self._host_cache()
        cache.rehearse()
        self.cache = replace(self._cache, pool=cache.pool)
        return hidden
