"""Tests the simulator's counts against the engine, and its clock against a plain rule."""

from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared.oracle import Oracle, belady
from studies.offload import simulator
from studies.offload.engine import replay
from studies.offload.simulator import Link, Trace, begin, next_uses
from studies.offload.traces import make_traces, route_windows
from support.models.offloaded import (
    EXPERTS,
    GREEDY,
    LAYERS,
    VOCAB,
    K,
    build,
    offloaded,
    serve,
    write_model,
    write_profile,
)

from jmoe.config.moe import MoEConfig
from jmoe.engine.engine import Engine
from jmoe.engine.request import Request
from jmoe.offload.policy import RULES, expected_use, lru
from jmoe.offload.predictors.none import NoPredictor
from jmoe.offload.slot_table import CacheSettings, fill, new_table

AT_ONCE = Link(copy_time=0.0, prompt_time=0.0)
PROMPT = 12
COUNTED = {
    "hits": "expert_cache_hits", "misses": "expert_cache_misses", "evicted": "expert_cache_evictions",
    "copied": "bytes_host_to_device", "prefetched": "prefetch_bytes", "useful": "prefetch_useful_bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), layers=4)


@pytest.fixture(scope="module")
def store(model: Path) -> str:
    return write_profile(model)


def decode_counts(engine) -> dict[str, int]:
    """Returns the counts of the decode phase, over all layers."""
    engine.runner.drain()
    sums_L = engine.runner.counters["decode"].sums_L
    return {ours: int(sums_L[name].sum()) for ours, name in COUNTED.items()}


@pytest.fixture(scope="module")
def traces(model: Path) -> dict[int, tuple[list[list[int]], list[list[int]], Trace]]:
    """Returns, by batch, prompts, what the resident engine answers, and the trace of its decode steps."""
    found = {}
    with closing(build(model)) as engine:
        for batch in (1, 3):
            prompts = np.random.default_rng(batch).integers(0, VOCAB, (batch, PROMPT)).tolist()
            answers = serve(engine, prompts)
            windows = np.array([p + a[:-1] for p, a in zip(prompts, answers, strict=True)], np.int32)
            (trace,) = make_traces(route_windows(engine.runner.model, windows), PROMPT, batch)
            found[batch] = prompts, answers, trace
    return found


def decode_after_all_prompts(engine: Engine) -> None:
    """Makes the engine decode only after all prompts, as the traces do: all requests decode in lock step."""
    scheduler = engine.scheduler
    continues = scheduler._continues

    def waits(request: Request) -> bool:
        prompts = any(r.state.num_computed_tokens < r.state.num_prefill_tokens for r in scheduler.running)
        return not (scheduler.waiting or prompts) and continues(request)

    scheduler._continues = waits


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("predictor", "eviction", "copies", "slots_per_layer", "batch"),
    [
        ("none", "lfu", 1, 1, 3), ("counts", "lru", 2, 4, 3), ("token_table", "expected_use", 1, 1, 1),
        ("next_gate", "lfu", 3, 4, 1), ("expert_map", "expert_map", 2, 4, 1),
    ],
)  # fmt: skip
def test_the_simulator_counts_what_the_engine_does(
    model: Path,
    store: str,
    traces,
    predictor: str,
    eviction: str,
    copies: int,
    slots_per_layer: int,
    batch: int,
):
    """It counts hits, misses, evictions, prefetches and useful ones, and ends with equal slots."""
    prompts, answers, trace = traces[batch]
    how = {"predictor": predictor, "eviction": eviction, "prefetch_per_layer": copies, "store": store}
    with closing(offloaded(model, slots_per_layer=slots_per_layer, **how)) as engine:
        start = jax.tree.map(jnp.copy, (engine.runner.cache.table, engine.runner.cache.predictor))
        decode_after_all_prompts(engine)
        assert serve(engine, prompts) == answers
        counted, left = decode_counts(engine), np.asarray(engine.runner.cache.table.slots.held_S)
        settings = engine.runner.cache.settings
    state, _, figures = simulator.run(begin(*start), trace, None, settings, AT_ONCE)
    total = jax.tree.map(lambda each_N: int(each_N.sum()), figures)
    assert total.needed == counted["hits"] + counted["misses"] and total.late == 0
    assert (total.hits, total.misses) == (counted["hits"], counted["misses"])
    assert (total.evicted, total.prefetched) == (counted["evicted"], counted["prefetched"])
    assert total.useful == counted["useful"] and (counted["hits"] > 0 or slots_per_layer == 1)
    assert total.misses + total.prefetched == counted["copied"]
    assert np.asarray(state.table.slots.held_S).tolist() == left.tolist()


def test_the_oracle_runs_in_the_executor(model: Path, traces):
    """Before each step it receives what that step and all later ones need, as the plain run recorded them."""
    prompts, answers, trace = traces[1]
    needs, due = trace.needs_NLE, next_uses(trace.needs_NLE)
    with closing(offloaded(model, slots_per_layer=4, predictor="none")) as engine:
        start = jax.tree.map(jnp.copy, engine.runner.cache.table)
        settings = engine.runner.cache.settings
        oracle = Oracle(jnp.zeros(needs.shape[1:], bool), settings.distance)
        engine.runner = replay(engine.runner, oracle, iter(zip(needs, due, strict=True)))
        assert serve(engine, prompts) == answers
        counted = decode_counts(engine)
    _, _, figures = simulator.run(
        begin(start, oracle), trace, (needs, due), settings._replace(rule=belady), AT_ONCE
    )
    total = jax.tree.map(lambda each_N: int(each_N.sum()), figures)
    assert (total.hits, total.misses) == (counted["hits"], counted["misses"])
    assert (total.prefetched, total.useful) == (counted["prefetched"], counted["useful"])
    assert counted["hits"] > 0.9 * (counted["hits"] + counted["misses"])


def random_trace(steps: int, batch: int, seed: int, layers: int = 5, experts: int = 12) -> Trace:
    rng = np.random.default_rng(seed)
    scores = rng.dirichlet(np.full(experts, 0.3), (steps, layers, batch)).astype(np.float32)
    ids = np.argsort(-scores, axis=-1)[..., :K].astype(np.int32)
    ahead = np.repeat(scores[:, :, :, None], 3, axis=3)
    counts = (rng.random((batch, layers, experts)) < 0.5).astype(np.float32)
    tokens = np.zeros((steps, batch), np.int32)
    return Trace(tokens, np.zeros((steps, batch, 4), np.float32), scores, ids, ahead, counts)


def empty_table(slots: int, layers: int, experts: int):
    often = np.broadcast_to(-np.arange(experts, dtype=np.float32), (layers, experts))
    return fill(new_table(slots, layers, experts, np), often)[0]


@pytest.mark.parametrize("copy_time", [0.0, 0.5, 1.0, 3.0])
def test_without_prefetch_a_layer_waits_for_its_copies(copy_time: float):
    """LRU is restated with an ordered list: a layer waits until its misses are copied, one after another."""
    trace, slots, layers, experts = random_trace(40, 1, 0), 20, 5, 12
    table = empty_table(slots, layers, experts)
    state = begin(table, NoPredictor(3, experts))
    link = Link(copy_time=copy_time, prompt_time=4.0)
    _, prompt, figures = simulator.run(state, trace, None, CacheSettings(lru, 1, 3), link)
    held = [int(x) for x in table.slots.held_S]
    used = [0] * slots  # when each slot's expert was used; among equals the lower slot is evicted
    missing_L = [
        sum(trace.counts_BLE[0, i, e] > 0 and i * experts + e not in held for e in range(experts))
        for i in range(layers)
    ]
    assert float(prompt.time) == pytest.approx(sum(max(4.0, copy_time * m) for m in missing_L))
    hits, times, now = 0, [], 0
    for step in trace.ids_NLBK[:, :, 0]:
        time = 0.0
        for i, chosen in enumerate(step):
            needed = sorted(i * experts + int(e) for e in chosen)
            missing = [x for x in needed if x not in held]
            hits += len(needed) - len(missing)
            time += len(missing) * copy_time + 1
            gone = sorted((used[s], s) for s in range(slots) if held[s] not in needed)
            for x, (_, slot) in zip(missing, gone, strict=False):
                held[slot] = x
            for x in needed:
                used[held.index(x)] = now
            now += 1
        times.append(time)
    assert int(figures.hits.sum()) == hits
    assert np.asarray(figures.time) == pytest.approx(np.array(times))


def test_a_prefetch_that_is_still_on_its_way_is_late():
    """With a perfect forecast, a link as slow as a layer copies late, and a slower link even later."""
    trace = random_trace(30, 1, 1)
    needs = trace.needs_NLE
    table = empty_table(30, 5, 12)
    found = {}
    for copy_time in (0.0, 1.0, 6.0):
        state = begin(table, Oracle(jnp.zeros((5, 12), bool), 3))
        known = (needs, next_uses(needs))
        link = Link(copy_time, 1.0)
        found[copy_time] = simulator.run(state, trace, known, CacheSettings(belady, 1, 3), link)[2]
    sums = {c: jax.tree.map(lambda each_N: float(each_N.sum()), f) for c, f in found.items()}
    assert sums[0.0].late == 0 < sums[1.0].late < sums[6.0].late
    assert len({(f.hits + f.late, f.misses, f.prefetched) for f in sums.values()}) == 1  # the same decisions
    assert sums[0.0].stall == 0 < sums[1.0].stall < sums[6.0].stall
    assert sums[0.0].time == 30 * 5


def test_the_oracle_evicts_in_beladys_order():
    """Belady is restated with all copies on demand: the expert that is needed last is evicted."""
    trace, slots = random_trace(60, 1, 2), 20
    needs, layers, experts = trace.needs_NLE, 5, 12
    flat = [np.flatnonzero(needs[n, i]) + i * experts for n in range(60) for i in range(layers)]
    held, misses = [int(x) for x in empty_table(slots, layers, experts).slots.held_S], 0
    for now, needed in enumerate(flat):
        for x in needed:
            if x in held:
                continue
            misses += 1
            later = [next((t for t in range(now + 1, len(flat)) if h in flat[t]), 10**6) for h in held]
            order = [i for i in np.argsort(later)[::-1] if held[i] not in needed]
            held[order[0]] = int(x)
    table = empty_table(slots, layers, experts)
    known, silent = (needs, next_uses(needs)), Oracle(jnp.zeros((layers, experts), bool), 1)
    settings = CacheSettings(belady, 1, 1)
    state = begin(table, silent)
    _, _, figures = simulator.run(state, trace, known, settings, AT_ONCE)
    copied = int((figures.misses + figures.prefetched).sum())
    assert misses <= copied <= 1.03 * misses  # a prefetch spares the running layer's needs, a demand does not
    for eviction in ("lru", "lfu", "expected_use"):
        state = begin(table, NoPredictor(3, experts))
        other = simulator.run(state, trace, None, CacheSettings(RULES[eviction], 1, 3), AT_ONCE)[2]
        assert int(other.misses.sum()) > copied, eviction


def test_next_uses():
    needs = np.array([[[True, False]], [[False, False]], [[True, True]]])
    assert next_uses(needs).tolist() == [[[2, 2]], [[1, 1]], [[4, 4]]]


def test_the_config_reaches_the_rule(model: Path):
    """Its defaults are what won in the benchmark."""
    with closing(offloaded(model, slots_per_layer=EXPERTS)) as engine:
        assert engine.runner.cache.settings == CacheSettings(expected_use, 1, 3)
        assert MoEConfig().offload is None and GREEDY.temperature == 0
        assert len(engine.runner.cache.table.slots.held_S) == 4 * EXPERTS > LAYERS * K
