"""Expert offload in the engine: whatever is predicted and however few slots there are, the same tokens."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from offloaded import (
    EXPERT_BYTES,
    EXPERTS,
    LAYERS,
    SETTINGS,
    K,
    answers,
    build,
    offloaded,
    prompts,
    serve,
    write_model,
    write_profile,
)

from jmoe.checkpoint import convert
from jmoe.config import MoEConfig
from jmoe.engine.engine import Engine
from jmoe.tools.evaluate import evaluate

LEAST = {"memory": (K + 3) * EXPERT_BYTES}
PAIRS = [
    *((name, rule) for name in ("expert_map", "next_gate", "counts", "none") for rule in ("expert_map", "lru", "lfu")),
    ("warm expert_map", "expert_map"), ("warm expert_map", "lfu"), ("warm counts", "lru"),
    *(("warm token_table", rule) for rule in ("expert_map", "lru", "lfu")),
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def store(model: Path) -> str:
    return write_profile(model)


@pytest.fixture(scope="module")
def resident(model: Path) -> dict[int, list[list[int]]]:
    """The answers with all experts on the device, by the number of prompts."""
    engine = build(model, max_num_seqs=16)
    with closing(engine):
        return {count: serve(engine, prompts(count)) for count in (1, 4, 16)}


def check_counters(engine: Engine) -> dict:
    """Every copy is accounted for; the decode report."""
    stats = engine.moe_stats()
    for phase in ("prefill", "decode"):
        for layer in stats[phase]["per_layer"]:
            needed = layer["bytes_host_to_device"] - layer["prefetch_bytes"]
            assert needed == layer["expert_cache_misses"] * EXPERT_BYTES
            assert layer["prefetch_useful_bytes"] >= 0
        report = stats[phase]
        assert report["prefetch_useful_bytes"] <= report["prefetch_bytes"]
        mean = (report["expert_cache_hits"] + report["expert_cache_misses"]) / (report["steps"] * LAYERS)
        assert mean == pytest.approx(report["active_experts"])
    assert stats["prefill"]["prefetch_bytes"] == stats["prefill"]["expert_cache_evictions"] == 0
    return stats["decode"]


def check_pool(engine: Engine) -> int:
    """What each slot holds is the store's, bit for bit; how many slots hold one."""
    cache, store = engine.runner.cache, engine.runner.model.store.weights
    assert cache is not None
    held_S, slot_X = np.asarray(cache.table.slots.held_S), np.asarray(cache.table.slots.slot_X)
    assert not np.asarray(cache.table.slots.flying_S).any()
    for slot, flat in enumerate(held_S):
        assert slot_X[flat] == slot
        layer, expert = divmod(int(flat), EXPERTS)
        for pool, stack in (
            (cache.pool.gate_up_E2FD, store.gate_up_E2FD),
            (cache.pool.down_EDF, store.down_EDF),
        ):
            np.testing.assert_array_equal(np.asarray(pool)[slot], np.asarray(stack)[layer, expert])
    return len(held_S)


@pytest.mark.parametrize(("predictor", "eviction"), PAIRS)
def test_every_predictor_and_eviction_gives_the_resident_tokens(
    model: Path, store: str, resident, predictor: str, eviction: str
):
    """Three slots a layer, and a batch that needs about six experts of ten: some stream."""
    name = predictor.removeprefix("warm ")
    warm = store if name != predictor else None
    engine = offloaded(
        model, slots_per_layer=3, predictor=name, eviction=eviction, store=warm, prefetch_per_layer=2
    )
    with closing(engine):
        assert serve(engine, prompts(4)) == resident[4]
        decode = check_counters(engine)
        assert check_pool(engine) == 3 * LAYERS
        assert decode["expert_cache_misses"] > 0 < decode["expert_cache_evictions"]
        assert (decode["prefetch_bytes"] > 0) == (name != "none")


@pytest.mark.parametrize(
    ("budget", "count"),
    [
        (LEAST, 1), (LEAST, 4), (LEAST, 16), ({"slots_per_layer": 1}, 4), ({"slots_per_layer": EXPERTS}, 16),
        ({"memory": f"{(LAYERS * EXPERTS // 4 + 3) * EXPERT_BYTES}B"}, 16),
    ],
    ids=str,
)  # fmt: skip
def test_every_budget_and_batch_gives_the_resident_tokens(model: Path, resident, budget: dict, count: int):
    """From the slots of one token in one layer, over 10 % and 25 % of the experts, to all of them."""
    engine = offloaded(model, **budget, seqs=count)
    with closing(engine):
        assert serve(engine, prompts(count)) == resident[count]
        check_counters(engine)
        slots = check_pool(engine)
        everything = budget.get("slots_per_layer") == EXPERTS
        assert slots == (LAYERS * EXPERTS if everything else (5 if "B" in str(budget) else 2))


def test_a_full_pool_copies_nothing_in_decode(model: Path, resident):
    engine = offloaded(model, slots_per_layer=EXPERTS)
    with closing(engine):
        assert serve(engine, prompts(4)) == resident[4]
        stats = engine.moe_stats()
    for phase in ("prefill", "decode"):
        assert stats[phase]["bytes_host_to_device"] == stats[phase]["expert_cache_evictions"] == 0
        assert stats[phase]["expert_cache_hits"] > stats[phase]["expert_cache_misses"] == 0


def test_copies_beside_compute_bring_the_same(model: Path, resident):
    """As on an accelerator, where those of a layer are as many as the budget says, wished for or not."""
    engine = offloaded(model, slots_per_layer=3, predictor="next_gate", prefetch_per_layer=2)
    with closing(engine):
        assert engine.runner.cache is not None
        engine.runner.cache = replace(engine.runner.cache, beside=True)
        engine.runner.run(engine.runner.blank(1, 1))
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
        assert engine.runner.compilations.after_warm_up == 0


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
