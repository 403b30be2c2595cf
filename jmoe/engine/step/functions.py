"""The jitted step of a model and the other functions that are compiled.

One function serves all steps: it runs rows of tokens against the paged cache (``StepInput``) and samples the
next token after some of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec
from jmoe_kernels.paged_attention import LayerPages

from jmoe.engine.step.counters import add_step
from jmoe.engine.step.inputs import HostRows, StepInput
from jmoe.engine.step.penalties import Seats, count_last, replace_counts
from jmoe.engine.step.sampling import Sampled, SamplingRows, logprobs, rank, sample, score
from jmoe.engine.step.state import DeviceState, StepOutput
from jmoe.engine.step.windows import WindowFunctions
from jmoe.mesh import is_single, replicated
from jmoe.models.decoder import Decoder
from jmoe.models.journey import StepSettings
from jmoe.moe.types import DispatchStats, Knobs
from jmoe.nn.sequences import Sequences


def sequences_of(
    inputs: StepInput, latest_S: Array, ranks: int, *, has_lossy: bool, has_cache: bool
) -> Sequences:
    """Returns the step's sequences. The function is for use under jit.

    has_lossy: whether a lossy technique needs ``exact_B``.
    has_cache: whether an expert cache needs ``seats_B`` and ``fresh_B``.
    """

    def from_rows(rows: HostRows) -> Sequences:
        tokens_BT, positions_BT, table_BM, exact_B, seats_B, fresh_B = map(jnp.asarray, rows)
        if tokens_BT.shape[1] == 1:
            latest_B1 = latest_S.at[seats_B].get(mode="fill", fill_value=0)[:, None]
            tokens_BT = jnp.where(tokens_BT < 0, latest_B1, tokens_BT)
        requests = (seats_B, fresh_B) if has_cache else (None, None)
        return Sequences(tokens_BT, positions_BT, table_BM, exact_B if has_lossy else None, *requests)

    main = replace(from_rows(inputs.main_rows), phase=inputs.phase)
    if inputs.decode_rows is None:
        return main
    num_rows = len(inputs.main_rows.tokens_BT) // ranks
    return replace(main, decoding=from_rows(inputs.decode_rows), num_rows=num_rows)


def make_knobs(values: Mapping[str, float], step: int) -> Knobs:
    present = {name: np.array(value, np.float32) for name, value in values.items()}
    return Knobs(present, np.array(step & 0x7FFFFFFF, np.int32))


def sample_tokens(
    model: Decoder,
    hidden_RND: Array,
    inputs: StepInput,
    latest_S: Array,
    counts_SV: Array,
    stats: list[DispatchStats],
) -> tuple[Sampled, Array, Array]:
    """Returns the step's sampled tokens, the token sampled last for every seat, and the seats' counts. The
    function is for use under jit.

    stats: statistics of the step's layers; the assignments lost in them make the tokens wrong.
    """
    ranks, dim = model.split.sequence_ranks, hidden_RND.shape[-1]
    column_RS1 = inputs.logit_columns_B.reshape(ranks, -1, 1)
    last_RSD = jnp.take_along_axis(hidden_RND.reshape(ranks, -1, dim), column_RS1, axis=1)
    with jax.named_scope("sample"):
        rows = inputs.sampling_rows
        seats = _with_last(rows, Seats(latest_S, counts_SV, inputs.seats_B))
        sampled = sample(model.logits(last_RSD.reshape(-1, dim)), rows, seats)
    sampled = replace(
        sampled, num_lost=jnp.sum(jnp.stack([layer.num_lost for layer in stats]), dtype=jnp.int32)
    )
    # Without this the compiler divides the numbers of the seats among the devices, and gathers them here.
    seats_B = replicated(jnp.asarray(inputs.seats_B), model.mesh)
    return sampled, latest_S.at[seats_B].set(sampled.ids_B, mode="drop"), seats.counts_SV


def _with_last(rows: SamplingRows, seats: Seats) -> Seats:
    """Returns the seats with the counts of the tokens that the rows count. All of it is in a branch, because
    on a mesh it may need a collective."""

    def counted() -> Array:
        last_B = seats.known(rows.last_B)
        return count_last(seats.counts_SV, seats.seats_B, last_B, rows.is_counted_B)

    counts_SV = lax.cond(rows.has_penalties, counted, lambda: seats.counts_SV)
    return seats._replace(counts_SV=counts_SV)


@dataclass(frozen=True)
class ModelFunctions:
    """The functions of one model that are jitted, over its flat list of weights.

    The model's structure is closed over: as a static argument it would be hashed at every call (0.8 ms for
    six layers, a third of a decode step).
    """

    graph: nnx.GraphDef
    structure: Any  # a jax tree definition

    def merge(self, weights: list[Array]) -> Decoder:
        return nnx.merge(self.graph, jax.tree.unflatten(self.structure, weights))

    def step(
        self, weights: list[Array], state: DeviceState, inputs: StepInput, settings: StepSettings
    ) -> tuple[DeviceState, StepOutput]:
        """Runs one step: the decoder on the rows, then sampling.

        state: part of the device's state that belongs to the step's phase.
        """
        model, phase = self.merge(weights), inputs.phase
        needs = {"has_lossy": settings.knobs is not None, "has_cache": state.cache is not None}
        seqs = sequences_of(inputs, state.latest_S, model.split.sequence_ranks, **needs)
        out = model(seqs, state.pages, settings, state.cache)
        assert out.pages is not None
        sampled, latest_S, counts_SV = sample_tokens(
            model, out.hidden_RND, inputs, state.latest_S, state.counts_SV, out.stats
        )
        # The compiler cannot see the sharding of pages that come out of a kernel, and pages with another
        # sharding would make the next step compile again.
        shardings = [NamedSharding(model.mesh, layer.attention.state_spec) for layer in model.layers]
        pages = lax.with_sharding_constraint(out.pages, shardings)
        totals = add_step(state.totals[phase], out.stats)
        outputs = replicated((sampled, totals, latest_S, counts_SV, out.changes_B), model.mesh)
        sampled, totals, latest_S, counts_SV, changes_B = outputs
        state = DeviceState(pages, {phase: totals}, latest_S, counts_SV, out.cache)
        return state, StepOutput(sampled, out.hidden_RND, changes_B)

    def copy_pages(
        self, weights: list[Array], pages: list[LayerPages], from_R: Array, to_R: Array
    ) -> list[LayerPages]:
        """Copies each rank's page ``from_R`` over its page ``to_R``; both are 0 if the rank has none to
        copy."""

        def copy(a_P: Array, from_1: Array, to_1: Array) -> Array:
            one = lax.dynamic_index_in_dim(a_P, from_1[0], keepdims=True)
            return lax.dynamic_update_index_in_dim(a_P, one, to_1[0], 0)

        model = self.merge(weights)
        kinds = [layer.attention for layer in model.layers]

        def of_rank(pages: list[LayerPages], from_1: Array, to_1: Array) -> list[LayerPages]:
            def copied(layer: LayerPages) -> LayerPages:
                return jax.tree.map(lambda a_P: copy(a_P, from_1, to_1), layer)

            both = zip(kinds, pages, strict=True)
            return [copied(layer) if kind.state_axis == "page" else layer for kind, layer in both]

        if is_single(model.mesh):
            return of_rank(pages, from_R, to_R)
        states, rows = [kind.state_spec for kind in kinds], PartitionSpec(model.split.sequences)
        specs = {"in_specs": (states, rows, rows), "out_specs": states, "check_vma": False}
        return jax.shard_map(of_rank, mesh=model.mesh, **specs)(pages, from_R, to_R)

    def replace_counts(self, weights: list[Array], counts_SV: Array, seat: Array, row_V: Array) -> Array:
        """Replaces the counts of a seat; a number past the last seat changes nothing."""
        return replicated(replace_counts(counts_SV, seat, row_V), self.merge(weights).mesh)

    def score(self, weights: list[Array], hidden_BTD: Array, targets_BT: Array) -> tuple[Array, ...]:
        """Returns the log-probabilities of ``targets_BT``, the likeliest tokens with theirs, and the ranks of
        ``targets_BT``."""
        return self._in_chunks(lambda *args: (*score(*args), rank(*args)), weights, hidden_BTD, targets_BT)

    def logprobs(self, weights: list[Array], hidden_BTD: Array, targets_BT: Array) -> Array:
        """Returns the log-probabilities of ``targets_BT``."""
        return self._in_chunks(logprobs, weights, hidden_BTD, targets_BT)

    def _in_chunks(
        self,
        function: Callable[[Array, Array], Any],
        weights: list[Array],
        hidden_BTD: Array,
        targets_BT: Array,
    ) -> Any:
        """Returns ``function(logits, targets)``, computed about 128 positions at a time.

        Each chunk takes a few positions of every sequence, so that each rank of a mesh has work of its own.
        """
        model = self.merge(weights)
        b, t, _ = hidden_BTD.shape
        chunk = min(t, max(1, 128 // b))

        def chunks(a_BT: Array) -> Array:
            padded = jnp.pad(a_BT, ((0, 0), (0, -t % chunk), *[(0, 0)] * (a_BT.ndim - 2)))
            return padded.reshape(b, -1, chunk, *a_BT.shape[2:]).swapaxes(0, 1)

        def joined(a_NBC: Array) -> Array:
            return a_NBC.swapaxes(0, 1).reshape(b, -1, *a_NBC.shape[3:])[:, :t]

        args = chunks(hidden_BTD), chunks(targets_BT)
        scored = lax.map(lambda each: function(model.logits(each[0]), each[1]), args)
        return replicated(jax.tree.map(joined, scored), model.mesh)


@dataclass(frozen=True)
class Jitted:
    """The functions of ``ModelFunctions`` and ``WindowFunctions``, jitted except ``merge``. Each keeps the
    programs that it has compiled, by shapes and devices.

    merge: model from its weights.
    step: one step of the decoder, with sampling.
    copy_pages: copy of a page on each rank.
    replace_counts: other counts for a seat.
    score: log-probabilities of targets, the likeliest tokens with theirs, and the targets' ranks.
    logprobs: log-probabilities of targets alone.
    window_logits: logits of whole windows, without KV pages.
    window_routing: choices of all layers' routers in whole windows.
    """

    merge: Callable[[list[Array]], Decoder]
    step: jax.stages.Wrapped
    copy_pages: jax.stages.Wrapped
    replace_counts: jax.stages.Wrapped
    score: jax.stages.Wrapped
    logprobs: jax.stages.Wrapped
    window_logits: jax.stages.Wrapped
    window_routing: jax.stages.Wrapped


@lru_cache(maxsize=8)
def jitted(graph: nnx.GraphDef, structure: Any) -> Jitted:
    """Returns the jitted functions of one structure. Runners of equal models share them and their compiled
    programs.

    The graph, which holds the configuration and the mesh, is hashed once per runner. ``maxsize`` frees the
    programs of models that no longer run.
    """
    functions = ModelFunctions(graph, structure)
    windows = WindowFunctions(functions.merge)
    return Jitted(
        merge=functions.merge,
        step=jax.jit(functions.step, donate_argnums=1),
        copy_pages=jax.jit(functions.copy_pages, donate_argnums=1),
        replace_counts=jax.jit(functions.replace_counts, donate_argnums=1),
        score=jax.jit(functions.score),
        logprobs=jax.jit(functions.logprobs),
        window_logits=jax.jit(windows.logits),
        window_routing=jax.jit(windows.routing),
    )


@lru_cache(maxsize=32)
def maker(out_sharding: NamedSharding, make: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """Returns ``make(*args)``, compiled: ``device_put`` on a mesh of several processes would compare values
    first."""
    return jax.jit(partial(make, *args), out_shardings=out_sharding)
