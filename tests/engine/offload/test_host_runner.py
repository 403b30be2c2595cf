"""Experts driven from the host give the resident tokens and the decisions of the other executor."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.models.offloaded import (
    EXPERT_BYTES,
    EXPERTS,
    LAYERS,
    SETTINGS,
    VOCAB,
    K,
    check_pool,
    serve,
)

from jmoe.checkpoint import convert
from jmoe.config.moe import MoEConfig
from jmoe.config.techniques import BinningConfig, CapacityConfig, Eviction, OffloadConfig, PredictorName
from jmoe.engine.build import build_engine
from jmoe.engine.engine import Engine
from jmoe.engine.offload.host_runner import HostDrivenRunner
from jmoe.mesh import make_mesh

LEAST = {"memory": (K + 3) * EXPERT_BYTES}
QUARTER = {"memory": (LAYERS * EXPERTS // 4 + 3) * EXPERT_BYTES}
LOSSY = {"binning": BinningConfig(resident_bonus=1.0), "capacity": CapacityConfig(factor=1.0, phase="both")}


def build(model: Path, moe: MoEConfig = MoEConfig(), *, seqs: int = 4, warm_up: bool = False) -> Engine:
    """Returns an engine whose prompts are split into runs of 32 tokens."""
    settings = replace(SETTINGS, moe=moe, max_num_seqs=seqs, max_num_batched_tokens=32)
    return build_engine(model, settings, warm_up=warm_up)


def driven(model: Path, *, warm_up: bool = False, **offload) -> Engine:
    return build(model, MoEConfig(offload=OffloadConfig(executor="host", **offload)), warm_up=warm_up)


def prompts(count: int) -> list[list[int]]:
    """Returns prompts, of which the first is longer than one run."""
    rng = np.random.default_rng(count)
    return [rng.integers(0, VOCAB, n).tolist() for n in (45, *rng.integers(1, 20, count - 1))]


@pytest.fixture(scope="module")
def resident(model: Path):
    """Yields an engine with all experts on the device."""
    with closing(build(model)) as engine:
        yield engine


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("predictor", "eviction", "seqs", "budget", "lossy"),
    [
        ("counts", "expert_map", 4, QUARTER, {}),
        ("expert_map", "lru", 1, LEAST | {"store_size": 20}, {}),
        ("next_gate", "expected_use", 4, {"slots_per_layer": 3, "prefetch_per_layer": 2}, LOSSY),
    ],
    ids=["counts", "expert_map", "lossy"],
)
def test_tokens_and_decisions_are_those_of_the_graph(
    model: Path,
    resident: Engine,
    predictor: PredictorName,
    eviction: Eviction,
    seqs: int,
    budget: dict,
    lossy: dict,
):
    found = []
    for executor in ("graph", "host"):
        offload = OffloadConfig(predictor=predictor, eviction=eviction, executor=executor, **budget)
        with closing(build(model, MoEConfig(offload=offload, **lossy), seqs=seqs)) as engine:
            assert isinstance(engine.runner, HostDrivenRunner) == (executor == "host")
            tokens = serve(engine, prompts(seqs))
            check_pool(engine)
            assert engine.runner.cache is not None
            found.append((tokens, engine.moe_stats(), engine.runner.cache.table.slots.held_S.tolist()))
    assert found[0] == found[1]
    tokens, stats, _ = found[1]
    if lossy:
        assert stats["decode"]["remapped"] > 0 < stats["prefill"]["dropped"]
    else:
        assert tokens == serve(resident, prompts(seqs))
    full = budget.get("slots_per_layer") == EXPERTS
    assert (stats["decode"]["expert_cache_misses"] == 0) == full
    assert (stats["decode"]["prefetch_bytes"] > 0) == (predictor != "none" and not full)


def test_nothing_compiles_after_warm_up(model: Path, resident: Engine):
    """Streaming compiles nothing either, although padding needs no expert and so streams none."""
    with closing(driven(model, slots_per_layer=1, warm_up=True)) as engine:
        assert check_pool(engine) == LAYERS
        assert serve(engine, prompts(4)) == serve(resident, prompts(4))
        stats = engine.moe_stats()
        assert stats["decode"]["expert_cache_misses"] > stats["decode"]["expert_cache_evictions"]
        assert engine.runner.compilations.num_after_warmup == 0


def test_windows_are_those_of_the_resident_model(model: Path, resident: Engine):
    ids_BT = np.random.default_rng(0).integers(0, VOCAB, (2, 7)).astype(np.int32)
    positions_BT = np.where(np.arange(7) < [[7], [5]], np.arange(7), -1).astype(np.int32)
    picks_BM = np.array([[0, 6], [2, -1]], np.int32)
    with closing(driven(model, slots_per_layer=3)) as engine:
        assert engine.runner.cache is not None
        for t in (1, 7):
            given = ids_BT[:, :t], positions_BT[:, :t]
            ours, plain = (each.runner.window_logits(*given) for each in (engine, resident))
            np.testing.assert_allclose(ours[0], plain[0], atol=1e-5)
        ours, plain = (e.runner.window_routing(ids_BT, positions_BT, picks_BM) for e in (engine, resident))
        valid_BT = positions_BT >= 0
        np.testing.assert_array_equal(ours.ids_LBTK[:, valid_BT], plain.ids_LBTK[:, valid_BT])
        np.testing.assert_allclose(ours.gates_LBE, plain.gates_LBE, atol=1e-6)
        check_pool(engine)


def test_a_converted_checkpoint_serves_the_same(model: Path, resident: Engine, tmp_path: Path):
    convert(model, tmp_path / "converted", "float32")
    with closing(driven(tmp_path / "converted", slots_per_layer=3)) as engine:
        assert serve(engine, prompts(4)) == serve(resident, prompts(4))
    engine.close()


def test_a_model_that_is_not_offloaded_is_refused(resident: Engine):
    with pytest.raises(ValueError, match="needs offloaded experts"):
        HostDrivenRunner(resident.runner.model, make_mesh(), resident.runner.sizes)
