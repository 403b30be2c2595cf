"""Offloaded experts on a mesh give the tokens of one device that has all experts."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.models.offloaded import (
    EXPERT_BYTES,
    EXPERTS,
    LAYERS,
    SETTINGS,
    VOCAB,
    K,
    answers,
    build,
    check_counters,
    check_pool,
    offloaded,
    prompts,
    serve,
)

from jmoe.checkpoint import convert, load_model
from jmoe.checkpoint.identity import model_identity
from jmoe.config.moe import MoEConfig
from jmoe.config.techniques import OffloadConfig, ShuffleConfig
from jmoe.engine.build import build_engine
from jmoe.engine.engine import Engine
from jmoe.mesh import make_mesh
from jmoe.offload.predictors.base import PredictorInputs, PredictorSizes
from jmoe.offload.predictors.counts import RequestCounts
from jmoe.offload.predictors.expert_map import ExpertMaps
from jmoe.offload.predictors.history import RenumberedHistory
from jmoe.offload.predictors.make import make_predictor
from jmoe.placement.placement import Placement
from jmoe.placement.profile import Profile
from jmoe.placement.tables import Tables

LEAST = {"memory": (K + 3) * EXPERT_BYTES}  # memory of a device: the experts of one token in one layer


@pytest.fixture(scope="module")
def resident(model: Path) -> list[list[int]]:
    """Returns the answers of one device that has all experts; other tests show that meshes give the same."""
    return answers(build(model), 6)


@pytest.fixture(scope="module")
def placed(model: Path):
    """Writes a placement on two ranks with guesses that have nothing to do with it.

    Experts stay where they are, or go anywhere.
    """

    def path(*, moved: bool) -> str:
        rng = np.random.default_rng(7)
        shares = [rng.dirichlet(np.ones(2), (LAYERS, n)).astype(np.float16) for n in (VOCAB, 4)]
        tables = Tables(*(part for s in shares for part in (s.argmax(-1).astype(np.int16), s.max(-1), s)))
        rows = np.tile(np.arange(EXPERTS), (LAYERS, 1))
        plain = load_model(model, make_mesh())
        file = model / f"placement{moved}.npz"
        rows = rng.permuted(rows, axis=1) if moved else rows
        Placement(rows, 2, model_identity(plain), tables).save(file)
        return str(file)

    return path


def meshed(
    model: Path,
    shape: tuple[int, int, int],
    moe: MoEConfig = MoEConfig(),
    *,
    warm_up: bool = False,
    **offload: Any,
) -> Engine:
    axes = ("data_parallel_size", "expert_parallel_size", "tensor_parallel_size")
    moe = replace(moe, offload=OffloadConfig(**offload))
    sizes = dict(zip(axes, shape, strict=True))
    return build(model, moe, warm_up=warm_up, max_num_seqs=4, attention=moe.attention, **sizes)


@pytest.mark.parametrize(
    ("shape", "transport", "offload"),
    [
        pytest.param((1, 2, 1), "replicated", LEAST, marks=pytest.mark.matrix),
        ((1, 5, 1), "ragged_all_to_all", {"slots_per_layer": 1}),
        pytest.param((2, 2, 1), "all_to_all", {"slots_per_layer": 2}, marks=pytest.mark.matrix),
        pytest.param((1, 1, 2), "replicated", LEAST, marks=pytest.mark.matrix),
        pytest.param((2, 2, 2), "ragged_all_to_all", {"slots_per_layer": 2}, marks=pytest.mark.matrix),
    ],
    ids=str,
)
def test_every_mesh_transport_and_budget_gives_the_resident_tokens(
    model: Path, resident, shape: tuple[int, int, int], transport, offload: dict
):
    engine = meshed(model, shape, MoEConfig(transport=transport), **offload)
    with closing(engine):
        assert serve(engine, prompts(6)) == resident
        decode = check_counters(engine, groups=shape[0])
        assert decode["expert_cache_misses"] > 0 < decode["expert_cache_evictions"]
        memory = offload.get("memory", 0) * shape[2] // EXPERT_BYTES - 3  # parts of experts take less room
        assert check_pool(engine) == shape[0] * shape[1] * (
            LAYERS * offload.get("slots_per_layer", 0) or memory
        )


@pytest.mark.matrix
@pytest.mark.parametrize(  # tests below have expert_map and next_gate with a profile, of moved experts
    ("predictor", "start"), [("none", "cold"), ("counts", "warm"), ("token_table", "warm")]
)
def test_every_predictor_gives_the_resident_tokens(model: Path, store: str, resident, predictor, start: str):
    eviction = {"counts": "lfu", "none": "lru"}.get(predictor, "expected_use")
    more = {"store": store} if start == "warm" else {}
    more |= {} if predictor == "none" else {"prefetch_per_layer": 2}
    engine = meshed(model, (1, 2, 1), predictor=predictor, eviction=eviction, slots_per_layer=2, **more)
    with closing(engine):
        assert serve(engine, prompts(6)) == resident
        decode = check_counters(engine)
        assert (decode["prefetch_bytes"] > 0) == (predictor != "none")
        check_pool(engine)


@pytest.mark.matrix
def test_pools_that_hold_all_experts_copy_none_and_nothing_compiles_after_warm_up(model: Path, resident):
    engine = meshed(model, (1, 2, 1), slots_per_layer=EXPERTS // 2, warm_up=True)
    with closing(engine):
        assert serve(engine, prompts(6)) == resident
        stats = engine.moe_stats()
        assert engine.runner.compilations.num_after_warmup == 0
    for phase in ("prefill", "decode"):
        assert stats[phase]["bytes_host_to_device"] == stats[phase]["expert_cache_evictions"] == 0
        assert stats[phase]["expert_cache_hits"] > stats[phase]["expert_cache_misses"] == 0


@pytest.mark.matrix
def test_copies_during_compute_bring_the_same_on_every_rank(model: Path, resident):
    """As on an accelerator, a layer makes as many copies on each rank as the budget says."""
    engine = meshed(model, (1, 2, 1), slots_per_layer=2, predictor="next_gate", prefetch_per_layer=2)
    with closing(engine):
        assert engine.runner.cache is not None
        engine.runner.cache = replace(engine.runner.cache, has_parallel_copies=True)
        assert serve(engine, prompts(6)) == resident
        decode = check_counters(engine)
        check_pool(engine)
    _, *others = (layer["prefetch_bytes"] for layer in decode["per_layer"])
    assert others == [2 * 2 * EXPERT_BYTES * decode["steps"]] * (LAYERS - 1)


@pytest.mark.matrix
def test_a_converted_checkpoint_lies_on_the_mesh_alike(model: Path, resident, tmp_path: Path):
    convert(model, tmp_path / "converted", "float32")
    with closing(meshed(tmp_path / "converted", (1, 2, 1), slots_per_layer=2)) as engine:
        assert serve(engine, prompts(6)) == resident
        check_pool(engine)


@pytest.mark.matrix
def test_shuffled_rows_come_to_the_predictor_in_their_own_order(model: Path, placed, resident):
    """It learns of every request what it learns on one device that shuffles nothing."""
    seen = []
    shuffle = ShuffleConfig(placed(moved=False), history=True)
    for engine in (
        offloaded(model, slots_per_layer=3, predictor="counts"),
        meshed(
            model,
            (1, 2, 1),
            MoEConfig(attention="tp", shuffle=shuffle),
            predictor="counts",
            slots_per_layer=2,
        ),
    ):
        with closing(engine):
            assert serve(engine, prompts(6)) == resident
            assert engine.runner.cache is not None
            predictor = engine.runner.cache.predictor
            assert isinstance(predictor, RequestCounts)
            seen.append(np.asarray(predictor.counts_ZLE))
    assert seen[0].sum() > 0
    np.testing.assert_array_equal(*seen)


@pytest.mark.matrix
@pytest.mark.parametrize("predictor", ["expert_map", "next_gate"])  # the next test covers tables
def test_experts_that_were_moved_are_predicted_by_a_profile_of_the_checkpoint(
    model: Path, store: str, placed, resident, predictor
):
    shuffle = ShuffleConfig(placed(moved=True), history=True)
    moe = MoEConfig(attention="tp", shuffle=shuffle)
    engine = meshed(model, (1, 2, 1), moe, predictor=predictor, slots_per_layer=2, store=store)
    with closing(engine):
        assert serve(engine, prompts(6)) == resident
        check_counters(engine)
        check_pool(engine)


def test_a_renumbered_profile_says_the_same_of_every_expert(store: str):
    profile = Profile.load(Path(store))
    rows_LE = np.random.default_rng(5).permuted(np.tile(np.arange(EXPERTS), (LAYERS, 1)), axis=1)
    moved = RenumberedHistory(profile, rows_LE)
    for layer, row_E in enumerate(rows_LE):
        tokens_T = np.arange(VOCAB)
        was_TE = profile.chosen(layer, tokens_T)
        np.testing.assert_array_equal(moved.chosen(layer, tokens_T), was_TE[:, row_E])
        np.testing.assert_array_equal(moved.loads_LE[layer], was_TE.sum(0)[row_E])
    sizes = PredictorSizes(distance=2, k=K, layers=LAYERS, experts=EXPERTS, seats=4, store_size=99)
    embeddings_VD = np.random.default_rng(6).normal(size=(VOCAB, 8)).astype(np.float32)
    for name, table in (("counts", "stored_QLE"), ("token_table", "table_RLE")):
        was, now = (
            np.asarray(getattr(make_predictor(name, sizes, PredictorInputs(each)), table))
            for each in (profile, moved)
        )
        np.testing.assert_array_equal(now, np.take_along_axis(was, rows_LE[None], 2))
    maps = []
    for each in (profile, moved):
        predictor = make_predictor("expert_map", sizes, PredictorInputs(each, embeddings_VD))
        assert isinstance(predictor, ExpertMaps)
        maps.append(predictor.store.maps_CLE)
    np.testing.assert_array_equal(maps[1], np.take_along_axis(np.asarray(maps[0]), rows_LE[None], 2))


@pytest.mark.parametrize(
    ("offload", "message"),
    [
        (
            {"slots_per_layer": 3, "executor": "host"},
            "'host' drives one device, 'graph' any number: got a mesh ",
        ),
        ({"slots_per_layer": 6}, "at most the 5 experts of a layer on a device, got 6"),
        ({"memory": 1000}, f"the minimum is memory {(K + 3) * EXPERT_BYTES} "),
    ],
    ids=str,
)
def test_what_no_rank_has_room_for_is_refused(model: Path, offload: dict, message: str):
    moe = MoEConfig(offload=OffloadConfig(**offload))
    with pytest.raises(ValueError, match=message):
        build_engine(model, replace(SETTINGS, moe=moe, expert_parallel_size=2), warm_up=False)
