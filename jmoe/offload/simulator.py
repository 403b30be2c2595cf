"""A trace-driven simulator of the expert cache: the executor's own decisions, without weights, on a clock.

Predictor, table and rule are those of the step (``jmoe.offload.cache``), so hits, copies and evictions are the
executor's, expert for expert. Time is a model: a layer computes for 1, the link copies one expert in
``copy_time`` and takes copies in the order in which they were asked for; none can be called back.

    layer l:  its gate says what is needed -> copies of what is missing join the link's queue, then prefetches
              -> the layer waits until all it needs has come -> computes for 1

An expert counts as a hit where its copy had ended when it was needed; one that was still on its way is late:
no hit, and the layer waits for the rest of it. Comparators (config's predictors, and the oracle, which is
Belady's eviction with a perfect forecast) differ in nothing but the predictor and the eviction.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from jmoe.offload import table as decide
from jmoe.offload.policy import Outlook
from jmoe.offload.slots import land, resident
from jmoe.offload.table import Moves, Rule, Table
from jmoe.offload.types import LayerSeen, Predictor, StepSeen


class Trace(NamedTuple):
    """The decode steps of B requests that run together, N of them.

    counts_BLE: how often their prompts chose each expert. ahead_NLBAE: see ``LayerSeen``.
    """

    tokens_NB: Int[Array, "N B"]
    embeddings_NBD: Float[Array, "N B D"]
    scores_NLBE: Float[Array, "N L B E"]
    ids_NLBK: Int[Array, "N L B K"]
    ahead_NLBAE: Float[Array, "N L B A E"]
    counts_BLE: Float[Array, "B L E"]

    @property
    def needs_NLE(self) -> Bool[np.ndarray, "N L E"]:
        """Which experts each step needs."""
        n, layers, _, e = self.scores_NLBE.shape
        needs_NLE = np.zeros((n, layers, e), bool)
        np.put_along_axis(needs_NLE, np.asarray(self.ids_NLBK).reshape(n, layers, -1), True, axis=2)
        return needs_NLE


class Clock(NamedTuple):
    """now; when the link is free; when each expert's latest copy ends. In a layer's compute times."""

    now: Float[Array, ""]
    link: Float[Array, ""]
    there_X: Float[Array, " X"]


class Figures(NamedTuple):
    """Sums over the layers of one step. stall: time waited; time: of the whole step."""

    needed: Array
    hits: Array
    late: Array
    misses: Array
    evicted: Array
    prefetched: Array
    useful: Array
    stall: Array
    time: Array


class State(NamedTuple):
    table: Table
    predictor: Any
    clock: Clock


def begin(table: Table, predictor: Predictor) -> State:
    """A cache before its first step."""
    zero, x = jnp.zeros((), jnp.float32), table.slots.slot_X.shape[0]
    return State(jax.tree.map(jnp.asarray, table), predictor, Clock(zero, zero, jnp.zeros(x, jnp.float32)))


def next_uses(needs_NLE: Bool[np.ndarray, "N L E"]) -> Int[np.ndarray, "N L E"]:
    """How many steps after each step every expert is needed next; N + 1 where it is not."""
    n = len(needs_NLE)
    due_NLE = np.empty(needs_NLE.shape, np.int32)
    due_LE = np.full(needs_NLE.shape[1:], n + 1, np.int32)
    for i in reversed(range(n)):
        due_NLE[i] = due_LE
        due_LE = np.where(needs_NLE[i], 1, np.minimum(due_LE + 1, n + 1))
    return due_NLE


@partial(jax.jit, static_argnames=("rule", "oracle"))
def run(
    state: State,
    trace: Trace,
    known: tuple[Array, Array] | None,
    rule: Rule,
    copy_time: Float[Array, ""],
    *,
    oracle: bool = False,
) -> tuple[State, Figures]:
    """All steps of ``trace``; figures ``[N]``. known: for the oracle, what each step needs and when each expert
    is needed next (``next_uses``)."""
    b = trace.tokens_NB.shape[1]
    seats_B, everyone_B = jnp.arange(b, dtype=jnp.int32), jnp.ones(b, bool)
    predictor = state.predictor.absorb(seats_B, everyone_B, trace.counts_BLE)

    def step(state: State, given: tuple) -> tuple[State, Figures]:
        tokens_B, embeddings_BD, scores_LBE, ids_LBK, ahead_LBAE, known = given
        predictor, table = state.predictor, state.table
        if oracle:
            needs_LE, due_LE = known
            predictor = replace(predictor, needs_LE=needs_LE)
            table = table._replace(
                outlook=Outlook(needs_LE.astype(jnp.float32), needs_LE, table.outlook.heat_LE, due_LE)
            )
        walk, forecast = predictor.start(StepSeen(tokens_B, embeddings_BD, everyone_B, seats_B))
        table = decide.foresee(table, 0, forecast)
        table, moves = decide.prefetch(table, rule, -1)
        table = table._replace(slots=land(table.slots))
        started = state.clock.now
        clock = _copied(state.clock, moves, copy_time)

        def layer(carry: tuple, seen: tuple) -> tuple[tuple, Figures]:
            table, walk, clock = carry
            l, scores_BE, ids_BK, ahead_BAE = seen
            walk, forecast = predictor.observe(walk, l, LayerSeen(scores_BE, ids_BK, ahead_BAE))
            table = decide.foresee(table, l + 1, forecast)
            e = scores_BE.shape[1]
            needed_E = jnp.zeros(e, bool).at[ids_BK.reshape(-1)].set(True, mode="drop")
            held_E = decide.at(resident(table.slots), l, e) & needed_E
            hits_E = held_E & (decide.at(clock.there_X, l, e) <= clock.now)
            useful = jnp.sum(decide.at(table.usage.fetched_X, l, e) & needed_E, dtype=jnp.int32)
            table, missing = decide.demand(table, rule, needed_E, l, min(e, ids_BK.size))
            streamed = jnp.sum(needed_E & ~held_E, dtype=jnp.int32) - missing.count
            clock = _copied(clock, missing, copy_time)
            clock = clock._replace(link=clock.link + copy_time * streamed.astype(jnp.float32))
            came = jnp.max(jnp.where(needed_E, decide.at(clock.there_X, l, e), 0.0))
            came = jnp.where(streamed > 0, clock.link, came)
            table, wishes = decide.prefetch(table, rule, l)
            clock = _copied(clock, wishes, copy_time)
            wait = jnp.maximum(came - clock.now, 0)
            clock = clock._replace(now=clock.now + wait + 1)
            table = decide.finish_layer(table, needed_E, jnp.max(scores_BE, axis=0), l)
            needed = jnp.sum(needed_E, dtype=jnp.int32)
            hits, held = jnp.sum(hits_E, dtype=jnp.int32), jnp.sum(held_E, dtype=jnp.int32)
            figures = Figures(
                needed, hits, held - hits, needed - held, missing.evicted + wishes.evicted, wishes.count, useful,
                wait, wait + 1,
            )  # fmt: skip
            return (table, walk, clock), figures

        layers = jnp.arange(scores_LBE.shape[0], dtype=jnp.int32)
        (table, walk, clock), figures = lax.scan(
            layer, (table, walk, clock), (layers, scores_LBE, ids_LBK, ahead_LBAE)
        )
        total = jax.tree.map(lambda each_L: jnp.sum(each_L, axis=0), figures)
        total = total._replace(
            prefetched=total.prefetched + moves.count, evicted=total.evicted + moves.evicted,
            time=clock.now - started,
        )  # fmt: skip
        table = table._replace(outlook=table.outlook._replace(due_LE=None))
        return State(table, predictor.finish(walk), clock), total

    steps = (
        trace.tokens_NB, trace.embeddings_NBD, trace.scores_NLBE, trace.ids_NLBK, trace.ahead_NLBAE, known,
    )  # fmt: skip
    return lax.scan(step, State(state.table, predictor, state.clock), steps)


def _copied(clock: Clock, moves: Moves, copy_time: Array) -> Clock:
    """With ``moves`` in the link's queue, one after another."""
    m = moves.experts_M.shape[0]
    start = jnp.maximum(clock.link, clock.now)
    ends_M = start + copy_time * jnp.arange(1, m + 1, dtype=jnp.float32)
    there_X = clock.there_X.at[moves.experts_M].set(ends_M, mode="drop")
    link = jnp.where(moves.count > 0, start + copy_time * moves.count.astype(jnp.float32), clock.link)
    return clock._replace(link=link, there_X=there_X)
