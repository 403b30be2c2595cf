"""Tests what ``[moe.offload]`` refuses in one line that names the limit, and what it allows at the limit."""

from contextlib import closing
from pathlib import Path

import pytest
from support.models.offloaded import (
    EXPERT_BYTES,
    EXPERTS,
    LAYERS,
    K,
    build,
    offloaded,
    write_model,
    write_profile,
)

from jmoe.config.moe import MoEConfig
from jmoe.config.techniques import BinningConfig, CapacityConfig, OffloadConfig

SIZES = {"layers": LAYERS, "experts": EXPERTS, "k": K, "expert_bytes": EXPERT_BYTES}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("offload", "message"),
    [
        ({}, "moe.offload needs one of memory and slots_per_layer"),
        ({"memory": 1, "slots_per_layer": 1}, "moe.offload needs one of memory and slots_per_layer"),
        ({"memory": "2 gigs"}, "moe.offload.memory: '2 gigs' is not a size such as 2GiB or 512MiB"),
        ({"memory": 0}, "moe.offload.memory must be an integer of at least 1, got 0"),
        ({"memory": True}, "moe.offload.memory must be an integer of at least 1, got True"),
        ({"slots_per_layer": 1.5}, "moe.offload.slots_per_layer must be an integer of at least 1, got 1.5"),
        ({"prefetch_distance": 0}, "moe.offload.prefetch_distance must be an integer of at least 1, got 0"),
        ({"prefetch_per_layer": 0}, "moe.offload.prefetch_per_layer must be an integer of at least 1, got 0"),
        ({"store_size": -1}, "moe.offload.store_size must be an integer of at least 1, got -1"),
        ({"store": ""}, "moe.offload.store must name a file, got ''"),
        (
            {"predictor": "crystal_ball"},
            "moe.offload.predictor must be one of expert_map, next_gate, token_table, counts, none, "
            "got 'crystal_ball'",
        ),
        (
            {"eviction": "fifo"},
            "moe.offload.eviction must be one of expected_use, expert_map, lru, lfu, got 'fifo'",
        ),
        ({"predictor": "token_table"}, "moe.offload.predictor = 'token_table' needs moe.offload.store"),
        ({"slots": 4}, "unknown key 'slots'"),
    ],
    ids=str,
)
def test_a_table_that_means_nothing_is_refused(offload: dict, message: str):
    size = {} if {"memory", "slots_per_layer"} & set(offload) or not offload else {"slots_per_layer": 4}
    with pytest.raises(ValueError) as caught:
        MoEConfig.from_dict({"offload": size | offload})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_bonus_for_what_is_resident_needs_offload():
    with pytest.raises(ValueError, match=r"^moe.binning.resident_bonus needs moe.offload"):
        MoEConfig.from_text('{"binning": {"resident_bonus": 1.0}}')
    MoEConfig.from_text('{"binning": {"resident_bonus": 1.0}, "offload": {"memory": "1MB"}}')


@pytest.mark.parametrize("bonus", [0.0, 1.0])
def test_without_offload_a_stage_that_needs_it_goes_too(bonus: float):
    offload = OffloadConfig(slots_per_layer=4)
    moe = MoEConfig(binning=BinningConfig(resident_bonus=bonus), capacity=CapacityConfig(), offload=offload)
    plain = moe.without_offload()
    assert plain.offload is None and plain.capacity == moe.capacity
    assert plain.binning == (None if bonus else moe.binning)
    assert plain.without_offload() == plain


@pytest.mark.parametrize("copies", [1, 2, 5])
def test_the_minimum_that_is_named_is_the_minimum(model: Path, copies: int):
    """It has room for one token's experts, for what is in flight, and for the slot of unrequested copies."""
    least = (K + max(2, copies) + 1) * EXPERT_BYTES
    named = f"the minimum is memory {least} "
    for small in ({"memory": least - 1}, {"memory": 1}):
        config = OffloadConfig(**small, prefetch_per_layer=copies)
        with pytest.raises(ValueError, match=named):
            config.slots(**SIZES)
    with pytest.raises(ValueError, match=rf"memory {least - 1} has room for {K - 1} experts .* uses {K}"):
        offloaded(model, memory=least - 1, prefetch_per_layer=copies)
    with closing(offloaded(model, memory=least, prefetch_per_layer=copies)) as engine:
        assert engine.runner.cache is not None
        assert engine.runner.cache.pool.gate_up_E2FD.shape[0] == K + 1


def test_slots_a_layer_are_at_most_the_experts(model: Path):
    limit = f"at most the {EXPERTS} experts of a layer on a device, got {EXPERTS + 1}"
    with pytest.raises(ValueError, match=limit):
        offloaded(model, slots_per_layer=EXPERTS + 1)
    everything = LAYERS * EXPERTS
    assert OffloadConfig(slots_per_layer=EXPERTS).slots(**SIZES) == everything
    assert OffloadConfig(memory="1GiB").slots(**SIZES) == everything, "no more slots than experts"
    with pytest.raises(ValueError, match=f"slots_per_layer 1 has room for 1 experts and a token uses {K}"):
        OffloadConfig(slots_per_layer=1).slots(**SIZES | {"layers": 1})


def test_a_profile_of_another_model_is_refused(model: Path, tmp_path: Path):
    other = write_profile(write_model(tmp_path, LAYERS + 1))
    with pytest.raises(ValueError, match=r"was made from .*, this is .*: profile it anew"):
        offloaded(model, slots_per_layer=3, store=other)


def test_a_store_that_is_no_profile_is_refused(model: Path):
    for path, message in ((model / "absent.npz", "absent.npz"), (model / "text.txt", "text.txt")):
        with pytest.raises(ValueError, match=message):
            offloaded(model, slots_per_layer=3, store=str(path))


def test_training_with_offload_is_refused():
    with pytest.raises(ValueError, match=r"moe.offload and moe.train_capacity_factor exclude each other"):
        MoEConfig(kernel="batched", train_capacity_factor=1.0, offload=OffloadConfig(slots_per_layer=1))


def test_without_the_table_nothing_is_offloaded(model: Path):
    with closing(build(model)) as engine:
        assert engine.runner.cache is None
