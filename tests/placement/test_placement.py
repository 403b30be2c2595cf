"""Tests the placement of experts on ranks: the balancer, the table's checks and its file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.placement.placement import Placement, balance

EXAMPLE = Path(__file__).parents[3] / "shared" / "data" / "routing" / "eplb_example.json"


def test_the_published_example():
    if not EXAMPLE.is_file():
        pytest.skip("shared/data/routing is not next to the repository")
    case = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    placement = balance(
        np.array(case["weight"]), slots=case["num_replicas"], ranks=case["num_gpus"],
        nodes=case["num_nodes"], groups=case["num_groups"], model="example",
    )  # fmt: skip
    assert placement.experts_LP.tolist() == case["expected_phy2log"]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_expert_has_a_slot_and_groups_stay_on_their_node(data):
    nodes, ranks, groups = (data.draw(st.integers(1, 3)) for _ in range(3))
    experts = groups * nodes * data.draw(st.integers(1, 4))
    per_rank = -(-experts // (nodes * ranks)) + data.draw(st.integers(0, 2))
    loads = np.array(data.draw(st.lists(st.integers(0, 50), min_size=2 * experts, max_size=2 * experts)))
    placement = balance(
        loads.reshape(2, experts), slots=nodes * ranks * per_rank, ranks=nodes * ranks, nodes=nodes,
        groups=groups * nodes, model="m",
    )  # fmt: skip
    assert placement.experts == experts and (placement.replicas_LE >= 1).all()
    for row, slots_EM in zip(placement.experts_LP, placement.slots_LEM, strict=True):
        for expert, slots in enumerate(slots_EM):
            assert slots[slots >= 0].tolist() == [p for p in range(len(row)) if row[p] == expert]
        group_of_slot = row.reshape(nodes, -1) // (experts // (groups * nodes))
        homes = [set(node.tolist()) for node in group_of_slot]
        assert sum(map(len, homes)) == len(set.union(*homes)), "a group on two nodes"
    np.testing.assert_allclose(placement.rank_loads(loads.reshape(2, -1)).sum(1), loads.reshape(2, -1).sum(1))


def test_replicas_go_to_the_hottest_and_even_out_the_ranks():
    loads = np.array([[100, 10, 10, 10, 10, 10, 10, 10.0]])
    bare = balance(loads, slots=8, ranks=4, model="m")
    assert sorted(bare.experts_LP[0]) == list(range(8))
    spread = balance(loads, slots=12, ranks=4, model="m")
    assert spread.replicas_LE.tolist() == [[5, 1, 1, 1, 1, 1, 1, 1]]
    assert bare.rank_loads(loads).max() == 110 and spread.rank_loads(loads).max() <= 50
    idle = balance(np.zeros((1, 4)), slots=8, ranks=2, model="m")
    assert idle.replicas_LE.tolist() == [[2, 2, 2, 2]], "without any load all alike"


def test_nodes_that_do_not_divide_the_groups_are_balanced_as_one():
    loads = np.arange(12.0).reshape(1, 12)
    cluster = balance(loads, slots=16, ranks=8, nodes=2, groups=3, model="m")
    np.testing.assert_array_equal(cluster.experts_LP, balance(loads, slots=16, ranks=8, model="m").experts_LP)


@pytest.mark.parametrize(
    "loads, sizes, message",
    [
        (np.ones((1, 8)), {"slots": 6, "ranks": 2}, "8 experts need at least 8 slots, got 6"),
        (np.ones((1, 8)), {"slots": 9, "ranks": 2}, "9 slots do not split evenly over 2 ranks"),
        (np.ones((1, 8)), {"slots": 9, "ranks": 3, "nodes": 2}, "3 ranks do not split evenly over 2 nodes"),
        (
            np.ones((1, 8)),
            {"slots": 8, "ranks": 2, "groups": 3},
            "8 experts do not split evenly over 3 groups",
        ),
        (np.ones((1, 8)), {"slots": 8, "ranks": 0}, "8 slots do not split evenly over 0 ranks"),
        (np.ones(8), {"slots": 8, "ranks": 2}, r"loads must be a table .* got \(8,\)"),
        (np.full((1, 8), np.nan), {"slots": 8, "ranks": 2}, "numbers from 0 up"),
        (np.full((1, 8), -1), {"slots": 8, "ranks": 2}, "numbers from 0 up"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused(loads, sizes: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        balance(loads, **sizes, model="m")


def test_a_table_that_is_no_placement_is_refused():
    with pytest.raises(ValueError, match="layer 1 has no slot for expert 2"):
        Placement(np.array([[0, 1, 2, 3], [0, 1, 3, 3]]), 2, "m")
    with pytest.raises(ValueError, match="4 slots do not split evenly over 3 ranks"):
        Placement(np.array([[0, 1, 2, 3]]), 3, "m")
    with pytest.raises(ValueError, match="expert 4 needs more than 4 slots"):
        Placement(np.array([[0, 1, 2, 4]]), 2, "m")
    for bad in (np.array([0, 1]), np.array([[0.0, 1.0]]), np.array([[0, -1]]), np.zeros((0, 4), int)):
        with pytest.raises(ValueError, match="a placement is a table"):
            Placement(bad, 1, "m")


def test_the_file_gives_back_what_was_saved_and_refuses_another_model(tmp_path: Path):
    path = tmp_path / "placement"
    saved = balance(np.random.default_rng(0).random((3, 8)), slots=12, ranks=4, model="olmoe:abc")
    saved.save(path)
    loaded = Placement.load(path)
    np.testing.assert_array_equal(loaded.experts_LP, saved.experts_LP)
    assert (loaded.ranks, loaded.model, loaded.layers, loaded.experts) == (4, "olmoe:abc", 3, 8)
    here: dict[str, Any] = {"model": "olmoe:abc", "layers": 3, "experts": 8, "ranks": 4}
    loaded.check(**here)
    for name, theirs, message in (
        ("model", "tiny", "model olmoe:abc, here tiny"),
        ("layers", 2, "MoE layers 3, here 2"),
        ("experts", 16, "experts 8, here 16"),
        ("ranks", 8, "ranks 4, here 8"),
    ):
        with pytest.raises(ValueError, match=message):
            loaded.check(**{**here, name: theirs})


def test_files_that_are_no_placement_are_refused(tmp_path: Path):
    path = tmp_path / "p.npz"
    with pytest.raises(ValueError, match=r"cannot read the placement .*p\.npz"):
        Placement.load(path)
    for content in (b"", b"PK\x03\x04 not a zip", b"\x93NUMPY\x01\x00", b"{}"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"p\.npz"):
            Placement.load(path)
    np.savez(path, experts=np.zeros((1, 2), np.int32))
    with pytest.raises(ValueError, match=r"p\.npz is not a placement"):
        Placement.load(path)
    np.savez(path, format=np.array("jmoe placement 9"))
    with pytest.raises(ValueError, match="this release reads 'jmoe placement 2'"):
        Placement.load(path)
    np.save(path.open("wb"), np.zeros(3))
    with pytest.raises(ValueError, match=r"p\.npz"):
        Placement.load(path)
    np.savez(path, format=np.array("jmoe placement 2"), experts=np.array([[0, 2, 2]]), ranks=1, model="m")
    with pytest.raises(ValueError, match=r"p\.npz: layer 0 has no slot for expert 1"):
        Placement.load(path)
