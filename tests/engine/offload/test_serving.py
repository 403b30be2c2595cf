"""Tests expert offload in the engine: every budget and batch, other techniques, and the counts."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from support.models.offloaded import (
    EXPERT_BYTES,
    EXPERTS,
    LAYERS,
    SETTINGS,
    K,
    answers,
    build,
    check_counters,
    check_pool,
    offloaded,
    prompts,
    serve,
)

from jmoe.checkpoint import convert
from jmoe.config.moe import MoEConfig
from jmoe.config.techniques import BinningConfig, CapacityConfig, OffloadConfig
from jmoe.engine.engine import Engine
from jmoe.models.journey import StepSettings
from jmoe.tools.evaluate import evaluate

LEAST = {"memory": (K + 3) * EXPERT_BYTES}


@pytest.fixture(scope="module")
def resident(model: Path) -> dict[int, list[list[int]]]:
    """Returns the answers of an engine with all experts on the device, by the number of prompts."""
    with closing(build(model, max_num_seqs=16)) as engine:
        return {count: serve(engine, prompts(count)) for count in (1, 4, 16)}


@pytest.mark.parametrize(
    ("budget", "count"),
    [
        (LEAST, 1), ({"slots_per_layer": 1}, 4),
        pytest.param(
            {"memory": f"{(LAYERS * EXPERTS // 4 + 3) * EXPERT_BYTES}B"}, 16, marks=pytest.mark.matrix
        ),
    ],
    ids=str,
)  # fmt: skip
def test_every_budget_and_batch_gives_the_resident_tokens(model: Path, resident, budget: dict, count: int):
    """Budgets are one token's slots in a layer (10 % of the experts), and 25 %; the next test has all."""
    engine = offloaded(model, **budget, seqs=count)
    with closing(engine):
        assert serve(engine, prompts(count)) == resident[count]
        check_counters(engine)
        assert check_pool(engine) == {1: K, 4: LAYERS, 16: LAYERS * EXPERTS // 4}[count]


@pytest.mark.matrix
def test_a_full_pool_copies_nothing_in_decode(model: Path, resident):
    engine = offloaded(model, slots_per_layer=EXPERTS, seqs=16)
    with closing(engine):
        assert serve(engine, prompts(16)) == resident[16]
        stats = engine.moe_stats()
    for phase in ("prefill", "decode"):
        assert stats[phase]["bytes_host_to_device"] == stats[phase]["expert_cache_evictions"] == 0
        assert stats[phase]["expert_cache_hits"] > stats[phase]["expert_cache_misses"] == 0


@pytest.mark.matrix
def test_copies_during_compute_bring_the_same(model: Path, resident):
    """As on an accelerator, a layer makes as many copies as the budget says, requested or not."""
    engine = offloaded(model, slots_per_layer=3, predictor="next_gate", prefetch_per_layer=2)
    with closing(engine):
        assert engine.runner.cache is not None
        engine.runner.cache = replace(engine.runner.cache, has_parallel_copies=True)
        engine.runner.run(engine.runner.blank("decode", 1, 1))
        assert engine.moe_stats()["decode"]["prefetch_bytes"] == 0, "a step of padding counts as none"
        assert serve(engine, prompts(4)) == resident[4]
        decode = check_counters(engine)
        check_pool(engine)
    first, *others = (layer["prefetch_bytes"] for layer in decode["per_layer"])
    assert others == [2 * EXPERT_BYTES * decode["steps"]] * (LAYERS - 1)
    assert first == 2 * others[0], "its own, and those before it"


def test_nothing_compiles_after_warm_up(model: Path, resident):
    engine = build(model, MoEConfig.from_text('{"offload": {"slots_per_layer": 3}}'), warm_up=True)
    with closing(engine):
        assert serve(engine, prompts(4)) == resident[4]
        engine.moe_stats()
        assert engine.runner.compilations.num_after_warmup == 0


@pytest.mark.matrix
def test_a_converted_checkpoint_serves_the_same(model: Path, resident, tmp_path: Path):
    convert(model, tmp_path / "converted", "float32")
    assert answers(offloaded(tmp_path / "converted", slots_per_layer=3)) == resident[4]


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_eval_reports_the_resident_loss_and_what_was_copied(model: Path, mode):
    reports = []
    for text in ("{}", '{"offload": {"slots_per_layer": 3}}'):
        settings = replace(SETTINGS, moe=MoEConfig.from_text(text))
        reports.append(
            evaluate(
                str(model), [model / "text.txt"], mode=mode, batch_size=4, max_tokens=64, settings=settings
            )
        )
    plain, ours = reports
    assert ours["nll_per_token"] == pytest.approx(plain["nll_per_token"], rel=1e-6)
    assert plain["moe"]["bytes_host_to_device"] == plain["moe"]["expert_cache_hits"] == 0
    assert ours["moe"]["bytes_host_to_device"] > 0 < ours["moe"]["expert_cache_misses"]
    assert ours["moe"]["assignments"] == plain["moe"]["assignments"]


def test_a_whole_window_has_the_resident_logits(model: Path):
    ids = np.array(prompts(4)[2], np.int32)[None]
    where = np.arange(ids.shape[1], dtype=np.int32)[None]
    with closing(build(model)) as plain, closing(offloaded(model, slots_per_layer=3)) as ours:
        want, got = (engine.runner.window_logits(ids, where) for engine in (plain, ours))
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.matrix
def test_a_prompt_leaves_the_slots_as_they_are(model: Path):
    """A decode step does not."""
    engine = offloaded(model, slots_per_layer=3, predictor="counts")

    def table() -> list[np.ndarray]:
        assert engine.runner.cache is not None
        return [np.array(leaf) for leaf in jax.tree.leaves(engine.runner.cache.table)]

    with closing(engine):
        before, given = table(), engine.runner.blank("prefill", 1, 64)
        given.main_rows.tokens_BT[0, :9], given.main_rows.positions_BT[0, :9] = np.arange(9), np.arange(9)
        engine.runner.run(given)
        assert engine.moe_stats()["prefill"]["expert_cache_misses"] > 0
        for had, has in zip(before, table(), strict=True):
            np.testing.assert_array_equal(had, has)
        given = engine.runner.blank("decode", 1, 1)
        given.main_rows.tokens_BT[0], given.main_rows.positions_BT[0] = 9, 9
        engine.runner.run(given)
        assert any((had != has).any() for had, has in zip(before, table(), strict=True))


def routing(engine: Engine, ids: list[int]) -> np.ndarray:
    """Returns ``[L, T, K]``: the experts of every token of a sequence."""
    window = np.array([ids], np.int32), np.arange(len(ids), dtype=np.int32)[None]
    return engine.runner.window_routing(*window, np.full((1, 1), -1, np.int32)).ids_LBTK[:, 0]


def test_hits_and_misses_are_the_distinct_experts_that_each_step_needs(model: Path):
    """They are recomputed from the routing of the whole sequences, and from the tokens that each step had."""
    given, rows = prompts(4), []
    engine = offloaded(model, slots_per_layer=3)
    run = engine.runner.run

    def recorded(step):
        """Records whether the step only decodes, and the seats and last positions of its rows in use."""
        live_B = step.main_rows.positions_BT[:, 0] >= 0
        last_B = step.main_rows.positions_BT[live_B].max(axis=1)
        rows.append((step.phase == "decode", step.main_rows.seats_B[live_B], last_B))
        return run(step)

    engine.runner.run = recorded
    with closing(engine):
        tokens = [[*p, *out] for p, out in zip(given, serve(engine, given), strict=True)]
        decode = engine.moe_stats()["decode"]
        seats = [int(seats_B[0]) for decodes, seats_B, _ in rows if not decodes]
        assert sorted(seats) == [0, 1, 2, 3]
        used = [routing(engine, ids) for ids in tokens]
    needed = np.zeros(LAYERS, int)
    steps = [(seats_B, at_B) for decodes, seats_B, at_B in rows if decodes]
    for seats_B, at_B in steps:
        chosen = [set() for _ in range(LAYERS)]
        for seat, position in zip(seats_B, at_B, strict=True):
            for layer in range(LAYERS):
                chosen[layer] |= set(used[seats.index(int(seat))][layer, position].tolist())
        needed += [len(experts) for experts in chosen]
    needed_of_cache = [row["expert_cache_hits"] + row["expert_cache_misses"] for row in decode["per_layer"]]
    assert needed_of_cache == needed.tolist() and decode["steps"] == len(steps) > 0


@pytest.mark.matrix
def test_binning_with_offload_is_binning_and_a_bonus_copies_less(model: Path):
    def run(bonus: float, offload: OffloadConfig | None) -> tuple[list[list[int]], int]:
        moe = MoEConfig(binning=BinningConfig(resident_bonus=bonus), offload=offload)
        with closing(build(model, moe)) as engine:
            return serve(engine, prompts(4)), engine.moe_stats()["decode"]["bytes_host_to_device"]

    few = OffloadConfig(slots_per_layer=3)
    tokens, copied = run(0.0, few)
    assert tokens == run(0.0, None)[0]
    assert run(2.0, few)[1] < copied


@pytest.mark.matrix
def test_capacity_with_offload_is_capacity(model: Path, resident):
    moe = MoEConfig(capacity=CapacityConfig(factor=0.6, phase="both"))
    limited = answers(build(model, moe))
    assert answers(offloaded(model, moe, slots_per_layer=3)) == limited != resident[4]


def test_the_pool_is_changed_in_place(model: Path):
    """The compiled decode step needs far less room than the pool, so nothing of the pool is copied."""
    engine = offloaded(model, slots_per_layer=EXPERTS, seqs=1)
    with closing(engine):
        runner, given = engine.runner, engine.runner.blank("decode", 1, 1)
        state = runner.state.for_phase("decode")
        lowered = runner._jitted.step.lower(runner.weights, state, given, StepSettings())
        pool = sum(a.nbytes for a in jax.tree.leaves(runner.cache.pool))
        assert lowered.compile().memory_analysis().temp_size_in_bytes < pool / 4
