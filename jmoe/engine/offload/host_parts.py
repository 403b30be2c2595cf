"""The jitted parts of a step that the host drives layer by layer.

    begin -> (attend -> run_pooled [-> add_streamed ...]) x layers -> finish

Layers are alike: a part takes a layer's weights and its number as arguments and compiles once per shape. The
outputs of a layer's experts stay separate from its rows until the next part adds them, so that experts which
are streamed one by one need the same parts as those in the pool.

These parts are a second loop over the decoder's layers. What is added to ``Decoder.__call__`` or to
``DecoderLayer.__call__`` must be added here too; ``tests/engine/offload/test_host_runner.py`` shows that
both give the same tokens and decisions.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding
from jmoe_kernels.grouped_mlp import ExpertWeights
from jmoe_kernels.paged_attention import LayerPages

from jmoe.config.counters import CACHE, names
from jmoe.engine.offload.host_types import (
    AttentionResult,
    ExpertInput,
    HostJourney,
    HostState,
    LayerRecord,
    LayerRows,
    StepEnd,
    StepStart,
    stack_rows,
)
from jmoe.engine.step.counters import add_step
from jmoe.engine.step.functions import sample_tokens, sequences_of
from jmoe.engine.step.inputs import StepInput
from jmoe.engine.step.state import StepOutput
from jmoe.engine.step.windows import WindowRouting, summarize
from jmoe.mesh import sharding
from jmoe.models.decoder import Decoder, sum_changes
from jmoe.models.layer import DecoderLayer, token_flags
from jmoe.models.predictor_views import add_prompts, step_view
from jmoe.moe.counting import count_dispatch
from jmoe.moe.decide import Decision
from jmoe.moe.experts import ExpertMath
from jmoe.moe.routing import plan_dispatch
from jmoe.moe.types import DispatchStats, ExpertOutput, Knobs, Routing, TokenFlags, Traffic
from jmoe.nn.rope import Rotations
from jmoe.nn.sequences import Sequences
from jmoe.offload.copies import install
from jmoe.offload.ranks import assigned, by_slot, highest, needed
from jmoe.offload.types import LayerView, Predictor

PAGES = 4  # the argument of a layer's functions that holds its pages


@dataclass(frozen=True)
class LayerFunctions:
    """The parts of one kind of layer, as functions of its flat list of weights."""

    graph: nnx.GraphDef
    structure: Any

    def merge(self, weights: list[Array]) -> DecoderLayer:
        return nnx.merge(self.graph, jax.tree.unflatten(self.structure, weights))

    def attend(
        self,
        weights: list[Array],
        rows: LayerRows,
        rotations: Rotations,
        seqs: Sequences,
        pages: LayerPages | None,
        journey: HostJourney,
    ) -> tuple[AttentionResult, LayerPages | None]:
        """Runs one layer up to its experts."""
        layer, predictor, predictor_state = self.merge(weights), journey.predictor, journey.predictor_state
        x_ND, pages = layer.attend(layer.add(*rows), rotations, seqs, pages)
        knobs = None if journey.knobs is None else journey.knobs.for_part(journey.layer)
        normed_ND, decision = layer.decide(x_ND, seqs, knobs, journey.resident_E)
        flags = token_flags(seqs)
        ids_TK = assigned(decision.final_routing, flags.valid_T)
        report = [needed(ids_TK, decision.plain_routing.scores_TE.shape[1])]
        if predictor is not None:
            routers, chosen_TK = journey.next_routers, assigned(decision.plain_routing, flags.valid_T)
            next_scores_NAE = None if routers is None else layer.score_ahead(x_ND, routers)
            view = LayerView(decision.plain_routing.scores_TE, chosen_TK, next_scores_NAE)
            predictor_state, forecast = predictor.observe(predictor_state, journey.layer, view)
            report += [highest(decision.plain_routing.scores_TE, flags.valid_T), *forecast]
        expert_input = ExpertInput(normed_ND, ids_TK, decision.final_routing.weights_TK)
        plain = replace(decision.plain_routing, plan=None) if predictor is None else None
        record = LayerRecord(plain, _count_on_device(decision, flags), decision.changes)
        x_ND = layer.pass_shared(x_ND, normed_ND)
        return AttentionResult(x_ND, expert_input, record, predictor_state, stack_rows(*report)), pages

    def dense(
        self,
        weights: list[Array],
        rows: LayerRows,
        rotations: Rotations,
        seqs: Sequences,
        pages: LayerPages | None,
    ) -> tuple[LayerRows, LayerPages | None]:
        """Runs a whole layer without experts."""
        layer = self.merge(weights)
        x_ND, pages = layer.attend(layer.add(*rows), rotations, seqs, pages)
        x_ND = layer.pass_mlp(x_ND)
        return LayerRows(x_ND, jnp.zeros_like(x_ND)), pages


def _count_on_device(decision: Decision, tokens: TokenFlags) -> DispatchStats:
    """Counts what a layer on one device will do with its tokens; nothing is computed yet."""
    none = jnp.zeros((), jnp.int32)
    return count_dispatch(
        decision.plain_routing,
        decision.final_routing,
        tokens.valid_T,
        decision.changes,
        Traffic(none, none, none),
        None,
    )


@dataclass(frozen=True)
class PartFunctions:
    """The parts as functions of flat lists of weights; structures are closed over, see ``ModelFunctions``."""

    merge: Callable[[list[Array]], Decoder]
    expert_math: ExpertMath
    num_slots: int

    def begin(
        self,
        weights: list[Array],
        inputs: StepInput | Sequences,
        latest_S: Array,
        knobs: Knobs | None,
        predictor: Predictor | None,
    ) -> StepStart:
        """Runs the part before the first layer.

        predictor: predictor of the experts; None if nothing is predicted.
        """
        model = self.merge(weights)
        if isinstance(inputs, Sequences):
            seqs = inputs
        else:
            ranks = model.split.sequence_ranks
            seqs = sequences_of(inputs, latest_S, ranks, has_lossy=knobs is not None, has_cache=True)
        x_ND, rotations = model.begin(seqs)
        rows, predictor_state, forecast_RE = LayerRows(x_ND, jnp.zeros_like(x_ND)), None, None
        if predictor is not None:
            view = step_view(seqs, x_ND)
            assert view is not None, "prompts are not predicted"
            predictor_state, forecast = predictor.start(view)
            forecast_RE = stack_rows(*forecast)
        return StepStart(rows, rotations, seqs, predictor_state, forecast_RE)

    def run_pooled(self, expert_input: ExpertInput, slot_E: Array, pool: ExpertWeights) -> ExpertOutput:
        """Runs the experts that have a slot. The slot ``num_slots + 1`` means that an expert has none."""
        plan = by_slot(expert_input.ids_TK, slot_E, self.num_slots + 1)
        y_ND = self.expert_math(expert_input.x_TD, expert_input.weights_TK, plan, pool)
        return ExpertOutput(y_ND, plan.num_rows)

    def add_streamed(
        self, total: ExpertOutput, expert_input: ExpertInput, expert: Array, weights: ExpertWeights
    ) -> ExpertOutput:
        """Adds the output of one more expert."""
        plan = plan_dispatch(expert_input.ids_TK, jnp.ones(len(expert_input.ids_TK), bool), expert, 1)
        y_ND = total.y_ND + self.expert_math(expert_input.x_TD, expert_input.weights_TK, plan, weights)
        return ExpertOutput(y_ND, total.num_rows + plan.num_rows)

    def finish(
        self, weights: list[Array], state: HostState, inputs: StepInput, end: StepEnd, counts_CL: Array
    ) -> tuple[HostState, StepOutput]:
        """Runs the part after the last layer: sampling, counting, and the predictor's update.

        counts_CL: counters of ``CACHE``, by layer.
        """
        model, seqs, records = self.merge(weights), end.seqs, end.records
        hidden_RND = model.finish(model.layers[-1].add(*end.rows), seqs)
        counted = [dict(zip(names(CACHE), counts_CL[:, i], strict=True)) for i in range(len(records))]
        stats = [each.final_stats(counts) for each, counts in zip(records, counted, strict=True)]
        sampled, latest_S, counts_SV = sample_tokens(
            model, hidden_RND, inputs, state.latest_S, state.counts_SV, stats
        )
        changes_B = sum_changes([each.changes for each in records if each.changes is not None], seqs)
        predictor = state.predictor.finish(end.predictor_state) if seqs.phase == "decode" else state.predictor
        routings = [each.plain_routing for each in records if each.plain_routing is not None]
        predictor = add_prompts(predictor, seqs, routings)
        state = HostState(add_step(state.totals, stats), latest_S, counts_SV, predictor)
        return state, StepOutput(sampled, hidden_RND, changes_B)

    def window_logits(self, weights: list[Array], rows: LayerRows, seqs: Sequences) -> Array:
        model = self.merge(weights)
        return model.logits(model.finish(model.layers[-1].add(*rows), seqs))

    def window_routing(
        self, weights: list[Array], seqs: Sequences, picks_BM: Array, plain_routings: list[Routing]
    ) -> WindowRouting:
        return summarize(self.merge(weights), seqs, picks_BM, plain_routings)


@dataclass(frozen=True)
class Parts:
    """The functions of ``PartFunctions`` and ``install``, jitted.

    All their results have the shardings of the runner's own arrays: an argument with another sharding would
    compile again.

    layers: function of each layer: ``attend``, or ``dense`` if it has no experts.
    """

    begin: jax.stages.Wrapped
    layers: tuple[jax.stages.Wrapped, ...]
    run_pooled: jax.stages.Wrapped
    add_streamed: jax.stages.Wrapped
    install: jax.stages.Wrapped
    finish: jax.stages.Wrapped
    window_logits: jax.stages.Wrapped
    window_routing: jax.stages.Wrapped


@lru_cache(maxsize=8)
def jitted_parts(
    merge: Callable[[list[Array]], Decoder],
    layers: tuple[tuple[LayerFunctions, bool, NamedSharding], ...],
    expert_math: ExpertMath,
    num_slots: int,
    default_sharding: NamedSharding,
) -> Parts:
    """Returns one set that runners of equal models share, like ``jitted``.

    layers: kind of each layer, whether it has experts, and the sharding of its pages.
    default_sharding: sharding of all other arrays.
    """
    functions = PartFunctions(merge, expert_math, num_slots)

    def of(layer: LayerFunctions, sparse: bool, paged: NamedSharding) -> jax.stages.Wrapped:
        run = layer.attend if sparse else layer.dense
        return jax.jit(run, donate_argnums=PAGES, out_shardings=(default_sharding, paged))

    by_kind = {layer: of(*layer) for layer in set(layers)}
    return Parts(
        begin=jax.jit(functions.begin, out_shardings=default_sharding),
        layers=tuple(by_kind[layer] for layer in layers),
        run_pooled=jax.jit(functions.run_pooled, out_shardings=default_sharding),
        add_streamed=jax.jit(functions.add_streamed, donate_argnums=0, out_shardings=default_sharding),
        install=jax.jit(install, donate_argnums=0, out_shardings=default_sharding),
        finish=jax.jit(functions.finish, donate_argnums=1, out_shardings=default_sharding),
        window_logits=jax.jit(functions.window_logits),
        window_routing=jax.jit(functions.window_routing),
    )


def parts_of(model: Decoder, merge: Callable[[list[Array]], Decoder], num_slots: int) -> Parts:
    kinds, expert_math = [], None
    for layer in model.layers:
        graph, state = nnx.split(layer)
        paged = NamedSharding(model.mesh, layer.attention.state_spec)
        kinds.append((LayerFunctions(graph, jax.tree.structure(state)), layer.moe is not None, paged))
        expert_math = expert_math if layer.moe is None else layer.moe.math
    assert expert_math is not None
    return jitted_parts(merge, tuple(kinds), expert_math, num_slots, sharding(model.mesh))
