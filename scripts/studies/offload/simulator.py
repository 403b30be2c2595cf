"""Simulates the expert cache on a trace: the step makes its decisions on a clock, without weights.

The predictor, the table and the settings are those of the step (``jmoe.offload.cache``), so the hits, copies
and evictions equal those of the executor, expert for expert. Only time is modelled: a decode layer computes
for 1, and the link copies one expert in ``copy_time``. The link makes the copies in the order in which they
were requested, and no copy can be cancelled.

    prompt    every layer computes for ``prompt_time``, or for the time in which its missing experts stream
    layer l   its gate says what is needed -> copies of what is missing join the link's queue, then prefetches
              -> the layer waits until all that it needs has arrived -> it computes for 1

An expert is a hit if its copy had ended when the expert was needed. An expert whose copy had not ended yet is
late: it is not a hit, and the layer waits for the rest of the copy. The comparators (the predictors of the
config, and the oracle, which is Belady's eviction with a perfect forecast) differ only in the predictor and
the eviction.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int
from shared.oracle import Oracle, with_future

from jmoe.offload import slot_table
from jmoe.offload.policy import Outlook
from jmoe.offload.ranks import needed
from jmoe.offload.slot_table import CacheSettings, Copies, SlotTable
from jmoe.offload.slots import land, resident
from jmoe.offload.types import LayerView, Predictor, StepView


class Trace(NamedTuple):
    """The N decode steps of B requests that run together.

    tokens_NB: tokens of each step.
    embeddings_NBD: input embeddings of those tokens.
    scores_NLBE: routers' scores.
    ids_NLBK: experts that the routers chose.
    next_scores_NLBAE: scores of the next layers' routers, see ``LayerView``.
    counts_BLE: number of times that each request's prompt chose each expert.
    """

    tokens_NB: Int[Array | np.ndarray, "N B"]
    embeddings_NBD: Float[Array | np.ndarray, "N B D"]
    scores_NLBE: Float[Array | np.ndarray, "N L B E"]
    ids_NLBK: Int[Array | np.ndarray, "N L B K"]
    next_scores_NLBAE: Float[Array | np.ndarray, "N L B A E"]
    counts_BLE: Float[Array | np.ndarray, "B L E"]

    @property
    def needs_NLE(self) -> Bool[np.ndarray, "N L E"]:
        """Returns which experts each step needs."""
        n, layers, _, e = self.scores_NLBE.shape
        needs_NLE = np.zeros((n, layers, e), bool)
        np.put_along_axis(needs_NLE, np.asarray(self.ids_NLBK).reshape(n, layers, -1), True, axis=2)
        return needs_NLE


class Clock(NamedTuple):
    """The simulator's times, in units of a layer's compute time.

    now: present time.
    link: time at which the link becomes free.
    copy_end_X: time at which each expert's latest copy ends.
    """

    now: Float[Array, ""]
    link: Float[Array, ""]
    copy_end_X: Float[Array, " X"]


class Figures(NamedTuple):
    """Sums over the layers of one step.

    needed: experts needed.
    hits: needed experts whose copy had ended.
    late: needed experts that had a slot, but whose copy had not ended.
    misses: needed experts that were not in the pool.
    evicted: experts that lost their slot.
    prefetched: copies that a forecast requested.
    useful: prefetched experts that were then needed.
    stall: time during which layers waited.
    time: duration of the whole step.
    """

    needed: Array
    hits: Array
    late: Array
    misses: Array
    evicted: Array
    prefetched: Array
    useful: Array
    stall: Array
    time: Array


class PromptFigures(NamedTuple):
    """The run of all prompts together.

    needed: experts needed, over all layers.
    hits: those in the pool.
    time: its duration, in decode layers.
    """

    needed: Array
    hits: Array
    time: Array


class Link(NamedTuple):
    """The model's times, in decode layers.

    copy_time: time that the copy of one expert takes.
    prompt_time: time that a layer computes for the prompts.
    """

    copy_time: Float[Array, ""] | float
    prompt_time: Float[Array, ""] | float


class State(NamedTuple):
    table: SlotTable
    predictor: Any
    clock: Clock


def begin(table: SlotTable, predictor: Predictor) -> State:
    """Returns the state of a cache before its first step."""
    zero, x = jnp.zeros((), jnp.float32), table.slots.slot_X.shape[0]
    return State(jax.tree.map(jnp.asarray, table), predictor, Clock(zero, zero, jnp.zeros(x, jnp.float32)))


def next_uses(needs_NLE: Bool[np.ndarray, "N L E"]) -> Int[np.ndarray, "N L E"]:
    """Returns how many steps after each step every expert is needed next, N + 1 if it is not needed again."""
    n = len(needs_NLE)
    due_NLE = np.empty(needs_NLE.shape, np.int32)
    due_LE = np.full(needs_NLE.shape[1:], n + 1, np.int32)
    for i in reversed(range(n)):
        due_NLE[i] = due_LE
        due_LE = np.where(needs_NLE[i], 1, np.minimum(due_LE + 1, n + 1))
    return due_NLE


@partial(jax.jit, static_argnames=("settings",))
def run(
    state: State,
    trace: Trace,
    oracle_tables: tuple[Array, Array] | None,
    settings: CacheSettings,
    times: Link,
) -> tuple[State, PromptFigures, Figures]:
    """Runs the prompts and all steps of ``trace``. The figures of the steps are ``[N]``.

    oracle_tables: what each step needs and when each expert is needed next (``next_uses``), both
        ``[N, L, E]``, for the oracle; None for the other predictors.
    """
    b = trace.tokens_NB.shape[1]
    seats_B, everyone_B = jnp.arange(b, dtype=jnp.int32), jnp.ones(b, bool)
    predictor = state.predictor.add_prompts(seats_B, everyone_B, trace.counts_BLE)
    prompt = _prompt(state.table, trace.counts_BLE, times)
    idle = jnp.maximum(state.clock.now, state.clock.link)
    state = State(state.table, predictor, state.clock._replace(now=idle + prompt.time))

    def step(state: State, inputs: tuple) -> tuple[State, Figures]:
        tokens_B, embeddings_BD, layers, future = inputs
        if future is not None:
            assert isinstance(state.predictor, Oracle)
            table, predictor = with_future(state.table, state.predictor, *future)
            state = state._replace(table=table, predictor=predictor)
        state, predictor_state, figures = _start_step(
            state, StepView(tokens_B, embeddings_BD, everyone_B, seats_B), settings, times
        )
        table, predictor, clock = state

        def layer(carry: tuple, layer_inputs: tuple) -> tuple[tuple, Figures]:
            number, *view = layer_inputs
            return _layer(
                carry, number, LayerView(*view), predictor=predictor, settings=settings, times=times
            )

        (table, predictor_state, after), each_L = lax.scan(layer, (table, predictor_state, clock), layers)
        figures = jax.tree.map(lambda before, each_L: before + jnp.sum(each_L, axis=0), figures, each_L)
        table = table._replace(outlook=Outlook(*table.outlook[:3]))  # without the future
        return State(table, predictor.finish(predictor_state), after), figures

    index_NL = jnp.broadcast_to(
        jnp.arange(trace.ids_NLBK.shape[1], dtype=jnp.int32), trace.ids_NLBK.shape[:2]
    )
    layers = index_NL, trace.scores_NLBE, trace.ids_NLBK, trace.next_scores_NLBAE
    state, figures = lax.scan(step, state, (trace.tokens_NB, trace.embeddings_NBD, layers, oracle_tables))
    return state, prompt, figures


def _start_step(
    state: State, view: StepView, settings: CacheSettings, times: Link
) -> tuple[State, Any, Figures]:
    """Does what the step does before its first layer."""
    predictor_state, forecast = state.predictor.start(view)
    table, moves = slot_table.prefetch(slot_table.set_forecast(state.table, 0, forecast), settings, -1)
    table = table._replace(slots=land(table.slots))
    none, instant = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
    figures = Figures(none, none, none, none, moves.num_evictions, moves.num_copies, none, instant, instant)
    return State(table, state.predictor, _queue_copies(state.clock, moves, times)), predictor_state, figures


def _layer(
    carry: tuple[SlotTable, Any, Clock],
    layer: Array,
    view: LayerView,
    *,
    predictor: Predictor,
    settings: CacheSettings,
    times: Link,
) -> tuple[tuple[SlotTable, Any, Clock], Figures]:
    """Visits one layer in the same way as ``jmoe.offload.cache.Visit.run``."""
    (table, predictor_state, clock), scores_BE, ids_BK = carry, view.scores_BE, view.ids_BK
    predictor_state, forecast = predictor.observe(predictor_state, layer, view)
    table, e = slot_table.set_forecast(table, layer + 1, forecast), scores_BE.shape[1]
    needed_E = needed(ids_BK, e)
    held_E = slot_table.at_layer(resident(table.slots), layer, e) & needed_E
    hits = _count(held_E & (slot_table.at_layer(clock.copy_end_X, layer, e) <= clock.now))
    useful = _count(slot_table.at_layer(table.usage.fetched_X, layer, e) & needed_E)
    table, missing = slot_table.demand(table, settings, needed_E, layer, min(e, ids_BK.size))
    num_needed, held = _count(needed_E), _count(held_E)
    clock = _queue_copies(clock, missing, times)
    streamed = num_needed - held - missing.num_copies
    clock = clock._replace(link=clock.link + times.copy_time * streamed.astype(jnp.float32))
    came = jnp.max(jnp.where(needed_E, slot_table.at_layer(clock.copy_end_X, layer, e), 0.0))
    wait = jnp.maximum(jnp.where(streamed > 0, clock.link, came) - clock.now, 0)
    table, prefetches = slot_table.prefetch(table, settings, layer)
    clock = _queue_copies(clock, prefetches, times)
    clock = clock._replace(now=clock.now + wait + 1)
    table = slot_table.finish_layer(table, needed_E, jnp.max(scores_BE, axis=0), layer)
    evicted, prefetched = missing.num_evictions + prefetches.num_evictions, prefetches.num_copies
    figures = Figures(
        num_needed, hits, held - hits, num_needed - held, evicted, prefetched, useful, wait, wait + 1
    )
    return (table, predictor_state, clock), figures


def _count(marked_E: Bool[Array, " E"]) -> Int[Array, ""]:
    return jnp.sum(marked_E, dtype=jnp.int32)


def _prompt(table: SlotTable, counts_BLE: Array | np.ndarray, times: Link) -> PromptFigures:
    needed_LE = jnp.any(jnp.asarray(counts_BLE) > 0, axis=0)
    hits_LE = needed_LE & resident(table.slots).reshape(needed_LE.shape)
    missing_L = jnp.sum(needed_LE & ~hits_LE, axis=1).astype(jnp.float32)
    time = jnp.sum(jnp.maximum(times.prompt_time, times.copy_time * missing_L))
    return PromptFigures(jnp.sum(needed_LE, dtype=jnp.int32), jnp.sum(hits_LE, dtype=jnp.int32), time)


def _queue_copies(clock: Clock, copies: Copies, times: Link) -> Clock:
    """Returns the clock after ``copies`` have joined the link's queue, one after another."""
    m, copy_time = copies.experts_M.shape[0], times.copy_time
    start = jnp.maximum(clock.link, clock.now)
    ends_M = start + copy_time * jnp.arange(1, m + 1, dtype=jnp.float32)
    copy_end_X = clock.copy_end_X.at[copies.experts_M].set(ends_M, mode="drop")
    link = jnp.where(
        copies.num_copies > 0, start + copy_time * copies.num_copies.astype(jnp.float32), clock.link
    )
    return clock._replace(link=link, copy_end_X=copy_end_X)
