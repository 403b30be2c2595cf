"""Tests the capacity study's arithmetic against hand counts, and its document from small figures."""

import numpy as np
import pytest
from shared import peaks
from studies.capacity import drawn_routing, speed
from studies.capacity import quality_tables as quality
from studies.capacity.load import layer_loads
from studies.capacity.study import STUDY

from jmoe.config.techniques import CapacityConfig

# There are 4 experts, top 2, and the token ids 0 (half of the tokens) and 1. The second array says how often
# each id chose every expert.
LAYER = drawn_routing.Published(np.array([0.5, 0.5]), np.array([[1, 0.5, 0.5, 0], [1, 0, 0.25, 0.75]]), 2)


def test_peaks_against_a_hand_count():
    counts = np.array([6, 1, 1, 0])  # 8 plain assignments: evenly 2 an expert, 4 a rank
    assert peaks.expert_peak(counts, 8) == 3
    assert peaks.device_peak(peaks.rank_loads(counts, ranks=2), 8) == 7 / 4
    # Two replicas of expert 0 and five slots more on two ranks: 3 + 1 and 3 + 1.
    assert peaks.eplb_peak(counts, counts, extra=2, ranks=2) == 1


def test_published_rows_become_frequencies():
    rows = np.array([[0, 7, 4], [1, 7, 2], [2, 7, 2], [0, 9, 4], [2, 9, 1], [3, 9, 3]])
    read = drawn_routing.Published.from_rows(rows, experts=4, k=2)
    np.testing.assert_allclose(read.often_V, LAYER.often_V)
    np.testing.assert_allclose(read.chosen_VE, LAYER.chosen_VE)


def test_drawn_tokens_have_distinct_experts_and_the_published_frequencies():
    ids, scores = LAYER.draw(20_000, np.random.default_rng(0))
    assert (np.sort(ids, 1)[:, 0] != np.sort(ids, 1)[:, 1]).all()
    share = np.bincount(ids.ravel(), minlength=4) / len(ids)
    np.testing.assert_allclose(share, LAYER.often_V @ LAYER.chosen_VE, atol=0.02)
    own = np.take_along_axis(scores, ids, 1)
    assert (np.sort(scores, 1)[:, -2:] == np.sort(own, 1)).all()  # the top k of the scores are the choices


def test_a_limit_counts_each_ranks_own_tokens():
    ids = np.array([[[0, 1]] * 4, [[0, 2], [1, 2], [2, 3], [3, 0]]], np.int32)
    scores = np.full((2, 4, 4), 0.25, np.float32)
    plain = drawn_routing.limited_matrix(ids, scores, None)
    assert plain.tolist() == [[4, 4, 0, 0], [2, 1, 3, 2]]
    drop = drawn_routing.limited_matrix(ids, scores, CapacityConfig(policy="drop"), 1.0)
    assert drop.tolist() == [[2, 2, 0, 0], [2, 1, 2, 2]]  # 4 tokens x 2 / 4 experts on each rank
    expand = drawn_routing.limited_matrix(ids, scores, CapacityConfig(policy="expand"), 1.0)
    assert expand.tolist() == [[2, 2, 0, 0], [2, 1, 2, 2]]  # rank 1's own experts are full already


def test_a_ranks_rows_and_bytes():
    load = speed.load_of(np.array([[4, 4, 0, 0], [2, 1, 3, 2]]))
    assert load.groups_RL.tolist() == [[6, 5, 0], [3, 2, 0]]
    assert load.rows_RR.tolist() == [[8, 0], [3, 5]]
    assert load.seconds_on_wire(model=10, bandwidth=60.0) == 3
    placed = speed.eplb_load_of(np.array([[4, 4, 0, 0], [2, 1, 3, 2]]), np.array([6.0, 5, 3, 2]))
    assert placed.groups_RL.sum() == pytest.approx(16, abs=1) and placed.groups_RL.shape == (2, 3)


def figures() -> dict:
    """Returns results in which every setting loses 1 nat in 10 tokens of each of two documents."""
    tokens = {"a": [10, 10], "b": [10]}
    names = [f"{kind}/{f:g}" for kind in quality.KINDS.values() for f in quality.FACTORS]
    settings = {}
    for name in ["lossless", "expert_drop", *names]:
        nll = {"a": [21.0, 31.0], "b": [41.0]} if name != "lossless" else {"a": [20.0, 30.0], "b": [40.0]}
        settings[name] = {"nll": nll, "dropped": 0.1, "rerouted": 0.0, "extra": 0.0}
        settings[name] |= {"expert_peak_L": [2.0], "device_peak_L": [1.5]}
    part = {"command": "c", "budget": 20, "length": 8, "rows": 1, "tokens": tokens, "settings": settings}
    part["placement"] = {"own": [1.0], "others": [1.25]}
    part["positions"] = {name: [1.0, 2.0] for name in settings}
    part["control"] = {"length": 2, "rows": 4, "tokens": tokens, "settings": settings}
    even = drawn_routing.Published(np.ones(1), np.full((1, 8), 0.25), 2)
    layer = layer_loads(even, {name: np.ones(8) for name in ("own", "others")}, 8)
    load = {"command": "c", "draws": 4, "tokens": 8, "layers": [0]}
    load |= {"token_level": {"mixtral": {"book": [layer]}}, "marginal": {"mixtral": {"arxiv": [layer]}}}
    return {"quality": part, "load": load}


def test_a_difference_is_paired_and_weighs_documents():
    value, error = quality.difference(figures()["quality"], "drop/score/expert/1")
    assert value == pytest.approx(0.1) and error == pytest.approx(0)  # each document lost the same
    assert quality.judged(0.1, 0.01).startswith("yes") and quality.judged(0.1, 0.06).startswith("even")


def test_the_document_renders_from_small_figures():
    text = STUDY.document(figures())
    assert "| drop, score | +0.1000 ± 0.0000 |" in text and "Not yet measured on a quiet machine" in text
    for row in (line for line in text.splitlines() if line.startswith("|")):
        assert row.endswith("|")
    assert "Not measured yet" in STUDY.document({})
