"""The jitted parts of a step that the host drives layer by layer.

    begin -> (attend -> pooled [-> streamed ...]) x layers -> finish

Layers are alike: a part takes a layer's weights and its number as arguments and compiles once per shape. The
outputs of a layer's experts stay separate from its rows until the next part adds them, so that experts which
are streamed one by one need the same parts as those in the pool.
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
    Attended,
    Begun,
    HostJourney,
    HostState,
    Passed,
    Rows,
    Seen,
    Work,
    stack_rows,
)
from jmoe.engine.step.counters import add_step
from jmoe.engine.step.functions import WindowRouting, draw, sequences_of, summarize
from jmoe.engine.step.inputs import StepInput
from jmoe.engine.step.state import StepOutput
from jmoe.mesh import sharding
from jmoe.models.decoder import Decoder, step_seen, sum_changes
from jmoe.models.layer import DecoderLayer, token_flags
from jmoe.moe.decide import count_alone
from jmoe.moe.experts import ExpertMath
from jmoe.moe.routing import plan_dispatch
from jmoe.moe.types import Computed, Knobs, Routing
from jmoe.nn.rope import Rotation
from jmoe.nn.sequences import Sequences
from jmoe.offload.copies import install
from jmoe.offload.rows import assigned, by_slot, highest, needed
from jmoe.offload.types import LayerSeen, Predictor

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
        rows: Rows,
        rotation: Rotation,
        seqs: Sequences,
        pages: LayerPages | None,
        journey: HostJourney,
    ) -> tuple[Attended, LayerPages | None]:
        """Runs one layer up to its experts."""
        layer, predictor, walk = self.merge(weights), journey.predictor, journey.walk
        x_ND, pages = layer.attend(layer.add(*rows), rotation, seqs, pages)
        knobs = None if journey.knobs is None else journey.knobs.of(journey.layer)
        normed_ND, routed = layer.decide(x_ND, seqs, knobs, journey.resident_E)
        flags = token_flags(seqs)
        ids_TK = assigned(routed.final, flags.valid_T)
        news = [needed(ids_TK, routed.plain.scores_TE.shape[1])]
        if predictor is not None:
            ahead_NAE = None if journey.ahead is None else layer.score_ahead(x_ND, journey.ahead)
            chosen_TK = assigned(routed.plain, flags.valid_T)
            seen = LayerSeen(routed.plain.scores_TE, chosen_TK, ahead_NAE)
            walk, forecast = predictor.observe(walk, journey.layer, seen)
            news += [highest(routed.plain.scores_TE, flags.valid_T), *forecast]
        work = Work(normed_ND, ids_TK, routed.final.weights_TK)
        plain = replace(routed.plain, plan=None) if predictor is None else None
        kept = Seen(plain, count_alone(routed, flags), routed.changes)
        return Attended(layer.pass_shared(x_ND, normed_ND), work, kept, walk, stack_rows(*news)), pages

    def dense(
        self, weights: list[Array], rows: Rows, rotation: Rotation, seqs: Sequences, pages: LayerPages | None
    ) -> tuple[Rows, LayerPages | None]:
        """Runs a whole layer without experts."""
        layer = self.merge(weights)
        x_ND, pages = layer.attend(layer.add(*rows), rotation, seqs, pages)
        x_ND = layer.pass_mlp(x_ND)
        return Rows(x_ND, jnp.zeros_like(x_ND)), pages


@dataclass(frozen=True)
class PartFunctions:
    """The parts as functions of flat lists of weights; structures are closed over, see ``ModelFunctions``."""

    merge: Callable[[list[Array]], Decoder]
    apply: ExpertMath
    slots: int

    def begin(
        self,
        weights: list[Array],
        inputs: StepInput | Sequences,
        latest_S: Array,
        knobs: Knobs | None,
        predictor: Predictor | None,
    ) -> Begun:
        """Runs what comes before the first layer. predictor: None if nothing is predicted."""
        model = self.merge(weights)
        if isinstance(inputs, Sequences):
            seqs = inputs
        else:
            ranks = model.split.sequence_ranks
            seqs = sequences_of(inputs, latest_S, ranks, lossy=knobs is not None, cached=True)
        x_ND, rotation = model.begin(seqs)
        rows, walk, forecast_RE = Rows(x_ND, jnp.zeros_like(x_ND)), None, None
        if predictor is not None:
            seen = step_seen(seqs, x_ND)
            assert seen is not None, "prompts are not predicted"
            walk, forecast = predictor.start(seen)
            forecast_RE = stack_rows(*forecast)
        return Begun(rows, rotation, seqs, walk, forecast_RE)

    def pooled(self, work: Work, slot_E: Array, pool: ExpertWeights) -> Computed:
        """Runs the experts that have a slot; slot ``slots + 1`` means none."""
        plan = by_slot(work.ids_TK, slot_E, self.slots + 1)
        return Computed(self.apply(work.x_TD, work.weights_TK, plan, pool), plan.rows)

    def streamed(self, before: Computed, work: Work, expert: Array, one: ExpertWeights) -> Computed:
        """Adds the output of one more expert."""
        plan = plan_dispatch(work.ids_TK, jnp.ones(len(work.ids_TK), bool), expert, 1)
        y_ND = before.y_ND + self.apply(work.x_TD, work.weights_TK, plan, one)
        return Computed(y_ND, before.rows + plan.rows)

    def finish(
        self, weights: list[Array], state: HostState, inputs: StepInput, passed: Passed, counts_CL: Array
    ) -> tuple[HostState, StepOutput]:
        """Runs what comes after the last layer: sampling, counting, and the predictor's update.

        counts_CL: counters of ``CACHE``, by layer.
        """
        model, seqs, layers = self.merge(weights), passed.seqs, passed.layers
        hidden_RND = model.finish(model.layers[-1].add(*passed.rows), seqs)
        counted = [dict(zip(names(CACHE), counts_CL[:, i], strict=True)) for i in range(len(layers))]
        stats = [each.done(counts) for each, counts in zip(layers, counted, strict=True)]
        sampled, latest_S = draw(model, hidden_RND, inputs, state.latest_S, stats)
        changes_B = sum_changes([each.changes for each in layers if each.changes is not None], seqs)
        predictor = state.predictor.finish(passed.walk) if seqs.phase == "decode" else state.predictor
        predictor = model.absorb(predictor, seqs, [each.plain for each in layers if each.plain is not None])
        state = HostState(add_step(state.totals, stats), latest_S, predictor)
        return state, StepOutput(sampled, hidden_RND, changes_B)

    def window_logits(self, weights: list[Array], rows: Rows, seqs: Sequences) -> Array:
        model = self.merge(weights)
        return model.logits(model.finish(model.layers[-1].add(*rows), seqs))

    def window_routing(
        self, weights: list[Array], seqs: Sequences, picks_BM: Array, plain: list[Routing]
    ) -> WindowRouting:
        return summarize(self.merge(weights), seqs, picks_BM, plain)


@dataclass(frozen=True)
class Parts:
    """The functions of ``PartFunctions`` and ``install``, jitted. layers: for each layer ``attend``, or
    ``dense`` if it has no experts.

    All their results have the shardings of the runner's own arrays: an argument with another sharding would
    compile again.
    """

    begin: jax.stages.Wrapped
    layers: tuple[jax.stages.Wrapped, ...]
    pooled: jax.stages.Wrapped
    streamed: jax.stages.Wrapped
    install: jax.stages.Wrapped
    finish: jax.stages.Wrapped
    window_logits: jax.stages.Wrapped
    window_routing: jax.stages.Wrapped


@lru_cache(maxsize=8)
def parts(
    merge: Callable[[list[Array]], Decoder],
    kinds: tuple[tuple[LayerFunctions, bool, NamedSharding], ...],
    apply: ExpertMath,
    slots: int,
    whole: NamedSharding,
) -> Parts:
    """One set that runners of equal models share, like ``jitted``.

    kinds: the kind of each layer, whether it has experts, and the sharding of its pages.
    whole: sharding of all other arrays.
    """
    functions = PartFunctions(merge, apply, slots)

    def of(layer: LayerFunctions, sparse: bool, paged: NamedSharding) -> jax.stages.Wrapped:
        run = layer.attend if sparse else layer.dense
        return jax.jit(run, donate_argnums=PAGES, out_shardings=(whole, paged))

    of_kind = {kind: of(*kind) for kind in set(kinds)}
    return Parts(
        begin=jax.jit(functions.begin, out_shardings=whole),
        layers=tuple(of_kind[kind] for kind in kinds),
        pooled=jax.jit(functions.pooled, out_shardings=whole),
        streamed=jax.jit(functions.streamed, donate_argnums=0, out_shardings=whole),
        install=jax.jit(install, donate_argnums=0, out_shardings=whole),
        finish=jax.jit(functions.finish, donate_argnums=1, out_shardings=whole),
        window_logits=jax.jit(functions.window_logits),
        window_routing=jax.jit(functions.window_routing),
    )


def parts_of(model: Decoder, merge: Callable[[list[Array]], Decoder], slots: int) -> Parts:
    kinds, apply = [], None
    for layer in model.layers:
        graph, state = nnx.split(layer)
        paged = NamedSharding(model.mesh, layer.attention.state_spec)
        kinds.append((LayerFunctions(graph, jax.tree.structure(state)), layer.moe is not None, paged))
        apply = apply if layer.moe is None else layer.moe.math
    assert apply is not None
    return parts(merge, tuple(kinds), apply, slots, sharding(model.mesh))
