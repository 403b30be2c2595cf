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
from jmoe.engine.offload.host_types import (
    AttentionResult,
    ExpertInput,
    HostJourney,
    HostState,
    LayerRecord,
    LayerRows,
    StepEnd,
    StepStart,
    forecast_of,
)
from jmoe.engine.step.inputs import Sizes, StepInput
from jmoe.engine.step.runner import Runner
from jmoe.engine.step.state import StepOutput
from jmoe.engine.step.windows import WindowRouting
from jmoe.mesh import sharding
from jmoe.models.decoder import Decoder
from jmoe.models.journey import StepSettings
from jmoe.models.predictor_views import routers_after
from jmoe.moe.orders import ShuffleTables
from jmoe.moe.types import ExpertOutput, Knobs
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
        self._layer_weights = [jax.tree.leaves(nnx.state(layer)) for layer in model.layers]
        self._next_routers = [routers_after(model.layers, i) for i in range(len(model.layers))]
        self._store: Any = jax.tree.map(np.asarray, model.store.weights)
        self._sharding = SingleDeviceSharding(mesh.devices.item())
        numbers = [np.int32(i) for i in range(max(layers, experts))]
        self._device_numbers = jax.device_put(numbers, sharding(mesh))  # there before a part needs one
        self._routes_by_pool = any(table.reads_residency for table in model.moe.stages)
        self._is_rehearsal = False

    @property
    def _cache(self) -> ExpertCache:
        assert self.state.cache is not None, "a runner of offloaded experts has a cache until it is closed"
        return self.state.cache

    def _step(self, inputs: StepInput, settings: StepSettings) -> StepOutput:
        cache, phase = self._host_cache(), inputs.phase
        end = self._run_layers(inputs, cache, settings.knobs, is_decode=phase == "decode")
        kept = self.state.latest_S, self.state.counts_SV
        state = HostState(self.state.totals[phase], *kept, self._cache.predictor)
        state, output = self._parts.finish(self.weights, state, inputs, end, cache.counts_CL)
        kept = replace(self._cache, table=cache.table, predictor=state.predictor, pool=cache.pool)
        totals = self.state.totals | {phase: state.totals}
        seats = {"latest_S": state.latest_S, "counts_SV": state.counts_SV}
        self.state = replace(self.state, totals=totals, cache=kept, **seats)
        return output

    def window_logits(self, tokens_BT: np.ndarray, positions_BT: np.ndarray) -> np.ndarray:
        end = self._run_window(tokens_BT, positions_BT)
        return np.asarray(self._parts.window_logits(self.weights, end.rows, end.seqs))

    def window_routing(
        self, tokens_BT: np.ndarray, positions_BT: np.ndarray, picks_BM: np.ndarray
    ) -> WindowRouting:
        end = self._run_window(tokens_BT, positions_BT)
        plain = [each.plain_routing for each in end.records if each.plain_routing is not None]
        return jax.device_get(self._parts.window_routing(self.weights, end.seqs, picks_BM, plain))

    def close(self) -> None:
        super().close()
        self._layer_weights, self._next_routers, self._store = [], [], None

    def _run_window(self, tokens_BT: np.ndarray, positions_BT: np.ndarray) -> StepEnd:
        seqs = Sequences(*jax.device_put((tokens_BT, positions_BT)))
        return self._run_layers(seqs, self._host_cache(), None, is_decode=False)

    def _run_layers(
        self, inputs: StepInput | Sequences, cache: HostCache, knobs: Knobs | None, *, is_decode: bool
    ) -> StepEnd:
        """Runs all layers.

        inputs: input of the step, or ``Sequences`` for windows without page tables, which leave the pages
            unchanged.
        is_decode: whether this is a decode step, which fills the pool; else the pool does not change.
        """
        predictor = self._cache.predictor if is_decode else None
        knobs = jax.device_put(knobs, sharding(self.mesh))
        start: StepStart = self._parts.begin(self.weights, inputs, self.state.latest_S, knobs, predictor)
        if is_decode:
            cache.begin(forecast_of(np.asarray(start.forecast_RE)))
        rows, seqs, predictor_state = start.rows, start.seqs, start.predictor_state
        records: list[LayerRecord] = []
        for i, (weights, run) in enumerate(zip(self._layer_weights, self._parts.layers, strict=True)):
            layer = len(records)  # index among the layers with experts
            pages = None if seqs.table_BM is None else self.state.pages[i]
            args = weights, rows, start.rotations, seqs, pages
            if i in self.cfg.mlp_only_layers:
                rows, pages = run(*args)
            else:
                routers = self._next_routers[i] if is_decode else None
                resident_E = self._resident(cache, layer)
                journey = HostJourney(
                    self._device_numbers[layer], knobs, resident_E, predictor, predictor_state, routers
                )
                result: AttentionResult
                result, pages = run(*args, journey)
                cache.start_prefetches()
                predictor_state, report_RE = result.predictor_state, np.asarray(result.report_RE)
                y_ND, num_computed = self._run_experts(
                    layer, result.expert_input, report_RE, cache, is_decode=is_decode
                )
                rows = LayerRows(result.x_ND, y_ND)
                records.append(result.record._replace(num_computed=num_computed))
            if pages is not None:
                self.state.pages[i] = pages
        cache.start_prefetches()
        return StepEnd(rows, seqs, records, predictor_state)

    def _run_experts(
        self,
        layer: int,
        expert_input: ExpertInput,
        report_RE: np.ndarray,
        cache: HostCache,
        *,
        is_decode: bool,
    ) -> ExpertOutput:
        """Runs a layer's experts: those in the pool, and those that are streamed because it lacks them."""
        needed_E = report_RE[0] > 0
        if is_decode:
            most = min(self.cfg.num_experts, expert_input.ids_TK.size)
            cache.demand(layer, needed_E, report_RE[1], forecast_of(report_RE[2:]), most)
        else:
            cache.count_prefill(layer, needed_E)
        total: ExpertOutput = self._parts.run_pooled(expert_input, cache.slot_E(layer), cache.pool)

        def add(expert: int, weights: ExpertWeights) -> Array:
            nonlocal total
            total = self._parts.add_streamed(total, expert_input, self._device_numbers[expert], weights)
            return total.y_ND

        cache.stream(layer, [0] if self._is_rehearsal else cache.absent(layer, needed_E), add)
        return total

    def _resident(self, cache: HostCache, layer: int) -> Any:
        """Returns which of the layer's experts are in the pool, or None if routing does not depend on
        that."""
        if not self._routes_by_pool:
            return None
        cache.start_prefetches()
        return cache.resident_E(layer)

    def _host_cache(self) -> HostCache:
        return HostCache(self._cache, self._store, self._parts.install, self._sharding)

    def _rehearse(self, inputs: StepInput) -> Array:
        """Runs padding once at warm-up. It also copies one expert to the spare slot and streams one, because
        padding needs no experts."""
        self._is_rehearsal = True
        hidden = super()._rehearse(inputs)
        self._is_rehearsal = False
        cache = self._host_cache()
        cache.rehearse()
        self.cache = replace(self._cache, pool=cache.pool)
        return hidden
