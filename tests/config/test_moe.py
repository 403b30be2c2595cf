"""Tests what the MoE configuration accepts from Python, JSON and TOML, and its messages when it refuses."""

from pathlib import Path

import pytest

from jmoe.config.moe import MoEConfig
from jmoe.config.techniques import BinningConfig, CapacityConfig


def test_an_absent_block_is_off_and_an_empty_one_takes_the_defaults():
    assert MoEConfig.from_dict({}).capacity is None
    assert MoEConfig.from_dict({"capacity": None}).capacity is None
    assert MoEConfig.from_dict({"capacity": {}}).capacity == CapacityConfig()
    assert CapacityConfig() == CapacityConfig(1.5, "drop", "score", "expert", "prefill", 3, False)

    assert MoEConfig.from_dict({}).binning is None
    assert MoEConfig.from_dict({"binning": {}}).binning == BinningConfig()
    assert BinningConfig() == BinningConfig("affinity", 0.5, 3, 0.5, 0.0)


def test_json_and_toml_say_the_same(tmp_path: Path):
    toml = tmp_path / "moe.toml"
    toml.write_text(
        '[moe]\ntransport = "all_to_all"\n[moe.capacity]\npolicy = "reroute"\nfactor = 2\nrounds = 5\n'
    )
    text = '{"transport": "all_to_all", "capacity": {"policy": "reroute", "factor": 2, "rounds": 5}}'
    expected = MoEConfig(transport="all_to_all", capacity=CapacityConfig(2, "reroute", rounds=5))
    assert MoEConfig.from_text(str(toml)) == MoEConfig.from_text(text) == expected
    assert hash(expected) == hash(MoEConfig.from_text(text)), "modules hold it as static data"


@pytest.mark.parametrize(
    "values, message",
    [
        ({"gama": 2}, r"moe.capacity: unknown key 'gama'; nearest known key: "),
        ({"metrics": "score"}, "nearest known key: 'metric'"),
        ({"factor": 0}, "moe.capacity.factor must be a finite number above 0, got 0"),
        ({"factor": -1.5}, "above 0, got -1.5"),
        ({"factor": float("nan")}, "above 0, got nan"),
        ({"factor": float("inf")}, "above 0, got inf"),
        ({"factor": "1.5"}, "above 0, got '1.5'"),
        ({"factor": True}, "above 0, got True"),
        (
            {"policy": "dorp"},
            "moe.capacity.policy must be one of drop, reroute, expand, expert_drop, got 'dorp'",
        ),
        ({"metric": "first"}, "moe.capacity.metric must be one of score, order, reverse_order, random"),
        ({"scope": "rank"}, "moe.capacity.scope must be one of expert, device"),
        ({"phase": "all"}, "moe.capacity.phase must be one of prefill, decode, both"),
        ({"policy": "reroute", "rounds": 17}, "moe.capacity.rounds must be an integer from 1 to 16, got 17"),
        ({"policy": "reroute", "rounds": 0}, "from 1 to 16, got 0"),
        ({"policy": "reroute", "rounds": 2.0}, "from 1 to 16, got 2.0"),
        ({"renormalize": 1}, "moe.capacity.renormalize must be true or false, got 1"),
        ({"rounds": 5}, "moe.capacity.rounds = 5 has no effect with policy 'drop'; it needs one of reroute"),
        ({"policy": "expert_drop", "factor": 2.0}, "factor = 2.0 has no effect with policy 'expert_drop'"),
        ({"policy": "expert_drop", "scope": "device"}, "it needs one of drop, reroute, expand"),
        ([1], "moe.capacity must be a table of keys, got list"),
        (1.5, "moe.capacity must be a table of keys, got float"),
    ],
    ids=str,
)
def test_a_bad_capacity_block_is_refused_with_what_would_be_right(values, message: str):
    with pytest.raises(ValueError, match=message):
        MoEConfig.from_dict({"capacity": values})


@pytest.mark.parametrize(
    "values, message",
    [
        ({"width": 1}, r"moe.binning: unknown key 'width'; nearest known key: 'bin_width'"),
        ({"bin_width": 0}, "moe.binning.bin_width must be a finite number above 0, got 0"),
        ({"bin_width": -0.5}, "above 0, got -0.5"),
        ({"bin_width": float("nan")}, "above 0, got nan"),
        ({"bin_width": float("inf")}, "above 0, got inf"),
        ({"bin_width": "0.5"}, "above 0, got '0.5'"),
        ({"bin_width": True}, "above 0, got True"),
        (
            {"method": "lynx"},
            "moe.binning.method must be one of affinity, oea, budget, popularity, random, got 'lynx'",
        ),
        ({"method": "oea", "k0": 0}, "moe.binning.k0 must be an integer of at least 1, got 0"),
        ({"method": "oea", "k0": 2.0}, "at least 1, got 2.0"),
        ({"method": "budget", "keep": 0}, "moe.binning.keep must be a finite number above 0, got 0"),
        ({"method": "budget", "keep": 1.5}, "keep must be at most 1, all of the union, got 1.5"),
        ({"k0": 2}, "moe.binning.k0 = 2 has no effect with method 'affinity'; it needs one of oea"),
        (
            {"keep": 0.7},
            "keep = 0.7 has no effect with method 'affinity'; it needs one of budget, popularity",
        ),
        ({"method": "oea", "bin_width": 0.3}, "it needs one of affinity, budget"),
        ({"local_bonus": -1.0}, "moe.binning.local_bonus must be a finite number above 0, got -1.0"),
        ([1], "moe.binning must be a table of keys, got list"),
    ],
    ids=str,
)
def test_a_bad_binning_block_is_refused_with_what_would_be_right(values, message: str):
    with pytest.raises(ValueError, match=message):
        MoEConfig.from_dict({"binning": values})


@pytest.mark.parametrize(
    "values, message",
    [
        ({"executor": "gpu"}, "moe.offload.executor must be one of None, graph, host, got 'gpu'"),
        ({"executor": True}, "moe.offload.executor must be one of None, graph, host, got True"),
    ],
    ids=str,
)
def test_a_bad_offload_block_is_refused_with_what_would_be_right(values, message: str):
    with pytest.raises(ValueError, match=message):
        MoEConfig.from_dict({"offload": {"slots_per_layer": 4, **values}})


def test_a_misspelt_block_and_a_bare_table_are_refused():
    with pytest.raises(ValueError, match="moe config: unknown key 'capacty'; nearest known key: 'capacity'"):
        MoEConfig.from_dict({"capacty": {}})
    with pytest.raises(ValueError, match=r"moe\.capacity must be a CapacityConfig or None, got {}"):
        MoEConfig(capacity={})  # pyright: ignore[reportArgumentType]


def test_the_lossy_stages_stand_in_the_order_in_which_they_act():
    moe = MoEConfig.from_dict({"capacity": {}, "binning": {}})
    assert [table.name for table in moe.stages] == ["binning", "capacity"]
    assert not MoEConfig.from_dict({"offload": {"slots_per_layer": 2}}).stages
