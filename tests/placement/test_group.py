"""Tests grouping: exact balance, planted structure, small cases' optimum, tables against plain loops."""

import dataclasses
import itertools
from typing import get_args

import numpy as np
import pytest
from jaxtyping import Int
from support.models.routed import LAYERS, VOCAB, K, planted, planted_requests

import jmoe.placement.baselines
import jmoe.placement.objective
from jmoe.placement.baselines import balanced_splits, partitions
from jmoe.placement.coclustering import assign
from jmoe.placement.group import METHODS, group, make_placement
from jmoe.placement.methods import MethodName
from jmoe.placement.objective import Problem
from jmoe.placement.placement import Placement
from jmoe.placement.tables import SHARES
from jmoe.placement.tabulate import PRIOR, labels, put, rank_shares

HEURISTICS = ("alternating", "cross_entropy")


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(jmoe.placement.baselines, "ROUNDS", 15)


def test_the_commands_name_the_methods():
    assert tuple(METHODS) == get_args(MethodName)


def nothing(done: int, total: int, cost: float) -> None:
    pass


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_balanced_repeats_itself_and_tells_its_progress(method: str):
    profile, _ = planted(8, 4)
    seen = []
    one, two = (
        group(profile, ranks=4, method=method, seed=3, progress=lambda *step: seen.append(step))
        for _ in range(2)
    )
    np.testing.assert_array_equal(one.experts_LP, two.experts_LP)
    assert one.permutes and one.model == "planted" and one.ranks == 4 and one.tables is not None
    assert [np.bincount(home_E).tolist() for home_E in one.home_LE] == [[2] * 4] * LAYERS
    for i, home_E in enumerate(one.home_LE):
        assert (home_E[one.experts_LP[i]] == np.arange(8) // 2).all()
    assert not seen or seen[-1][0] == seen[-1][1]
    if method in HEURISTICS:
        assert seen[-1][2] == pytest.approx(
            Problem.from_profile(profile, 4).cost(one.home_LE).total, abs=1e-3
        )


@pytest.mark.parametrize("method", HEURISTICS)
def test_planted_groups_are_found(method: str):
    profile, home_LE = planted(16, 4, requests=30)
    problem = Problem.from_profile(profile, 4)
    found = group(profile, ranks=4, method=method).home_LE
    for mine, theirs in zip(found, home_LE, strict=True):
        assert len(set(zip(mine, theirs, strict=True))) == 4, "not the same groups"
    random = [METHODS["random"](problem, np.random.default_rng(s), nothing) for s in range(50, 60)]
    assert problem.cost(found).total < 0.6 * min(problem.cost(home).total for home in random)


@pytest.mark.parametrize("experts, ranks", [(6, 3), (8, 2), (8, 4)], ids=str)
def test_the_exact_method_is_never_beaten_and_the_others_come_close(experts: int, ranks: int):
    for seed in range(2):
        profile, _ = planted(experts, ranks, requests=8, seed=seed)
        problem = Problem.from_profile(profile, ranks)
        best = problem.cost(METHODS["moetuner"](problem, np.random.default_rng(0), nothing)).total
        for method, solve in METHODS.items():
            total = problem.cost(solve(problem, np.random.default_rng(0), nothing)).total
            assert total >= best - 1e-6, method
            if method in HEURISTICS:
                assert total <= 1.05 * best, method


def test_even_partitions_come_once_each():
    for experts, ranks in ((4, 2), (6, 2), (6, 3), (8, 4)):
        splits = list(balanced_splits(experts, ranks))
        names = {frozenset(frozenset(np.flatnonzero(home == r)) for r in range(ranks)) for home in splits}
        assert len(splits) == len(names) == partitions(experts, ranks)
        assert all((np.bincount(home) == experts // ranks).all() for home in splits)


def test_clusters_go_to_the_ranks_of_most_transitions():
    profile, _ = planted(8, 4)
    problem = Problem.from_profile(profile, 4)
    home_LE = METHODS["moetuner"](problem, np.random.default_rng(0), nothing)
    for layer in range(1, LAYERS):

        def stays(home_E, layer=layer):
            same = home_LE[layer - 1][:, None] == home_E
            return problem.following_LEE[layer - 1][same].sum()

        renamed = [np.array(names)[home_LE[layer]] for names in itertools.permutations(range(4))]
        assert stays(home_LE[layer]) == max(map(stays, renamed))


def test_the_assignment_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 5):
        for _ in range(10):
            gain = rng.integers(0, 6, (n, n)).astype(float)
            best = max(gain[range(n), list(p)].sum() for p in itertools.permutations(range(n)))
            place = assign(gain)
            assert sorted(place) == list(range(n)) and gain[range(n), place].sum() == best


def test_remote_is_what_the_best_equal_chunks_leave(monkeypatch):
    """The dual's value equals that of an exact assignment of single occurrences to places.

    With so few ids every price step moves much, so more steps are needed than on real text.
    """
    monkeypatch.setattr(jmoe.placement.objective, "STEPS", 3000)
    profile, home_LE = planted(8, 4, requests=8)
    layer = Problem.from_profile(profile, 4).layers[0]
    for home_E in (home_LE[0], np.arange(8) // 2):
        share_TR = layer.shares(home_E).T / layer.weight_T[:, None]
        each_NR = np.repeat(share_TR, profile.frequency_V[profile.frequency_V > 0], axis=0)
        each_NR = each_NR[: len(each_NR) // 4 * 4]
        place_N = assign(np.repeat(each_NR, len(each_NR) // 4, axis=1))
        local = each_NR[np.arange(len(each_NR)), place_N // (len(each_NR) // 4)].mean()
        assert 1 - layer.cost(home_E).remote == pytest.approx(local, abs=0.01)


def test_what_cannot_be_grouped_is_refused():
    profile, _ = planted(8, 4)
    for change, message in (
        ({"ranks": 3}, r"3 devices do not divide 8 experts; it can be one of \[1, 2, 4, 8\]"),
        ({"ranks": 0}, "0 devices do not divide"),
        ({"method": "luck"}, "unknown method 'luck'; it can be one of alternating"),
    ):
        with pytest.raises(ValueError, match=message):
            group(profile, **{"ranks": 4, **change})
    small, _ = planted(8, 4, requests=2)
    with pytest.raises(ValueError, match=r"counts \d+ tokens; 128 are needed, 16 for each of 8 experts"):
        group(small, ranks=4)
    large, _ = planted(32, 8)
    with pytest.raises(ValueError, match=r"moetuner goes through every partition: 32 experts on 8 devices"):
        METHODS["moetuner"](Problem.from_profile(large, 8), np.random.default_rng(0), nothing)
    with pytest.raises(ValueError, match="equally many"):
        make_placement(np.array([[0, 0, 0, 1]]), 2, "m")


def test_token_tables_are_those_of_plain_loops():
    profile, home_LE = planted(8, 4)
    tables = placed_tables(profile)
    requests = planted_requests(home_LE)
    home_LE = group(profile, ranks=4, method="load").home_LE
    for layer in range(LAYERS):
        counts = np.zeros((VOCAB, 4))
        for request in requests:
            for token, ids in zip(request.tokens_N, request.ids_LNK[layer], strict=True):
                for expert in ids:
                    counts[token, home_LE[layer, expert]] += 1
        average = counts.sum(0) / counts.sum()
        share = (counts + PRIOR * K * average) / (counts.sum(1, keepdims=True) + PRIOR * K)
        share[38], share[39] = share[3], share[0]
        np.testing.assert_allclose(tables.shares_LVR[layer], share, atol=1e-3)
        np.testing.assert_allclose(tables.confidence_LV[layer], share.max(1), atol=1e-3)
        own = share[np.arange(VOCAB), tables.ranks_LV[layer]]
        np.testing.assert_allclose(own, share.max(1), atol=1e-6)


def placed_tables(profile):
    tables = group(profile, ranks=4, method="load").tables
    assert tables is not None and tables.shares_LVR is not None
    return tables


def test_history_tables_are_those_of_plain_loops():
    profile, _ = planted(8, 4)
    placement = group(profile, ranks=4, method="load")
    tables, home_LE, sample = placement.tables, placement.home_LE, profile.sample
    assert tables is not None and not tables.next_confidence_LH[:2].any()
    shares: dict[int, list] = {}
    for q, p in np.argwhere(sample.tokens_QP >= 0):
        label = []
        for layer in range(2):
            key = [(0, 0.0)] * 4
            for expert, weight in zip(
                sample.ids_QPLK[q, p, layer], sample.weights_QPLK[q, p, layer], strict=True
            ):
                rank = home_LE[layer, expert]
                key[rank] = (key[rank][0] + 1, key[rank][1] + float(weight))
            label.append(max(range(4), key=lambda r: (key[r], -r)))
        on = [np.mean(home_LE[2, sample.ids_QPLK[q, p, 2]] == r) for r in range(4)]
        shares.setdefault(label[0] * 4 + label[1], []).append(on)
    average = np.mean(np.concatenate(list(shares.values())), axis=0)
    for history in range(16):
        if history not in shares:
            assert tables.next_confidence_LH[2, history] == 0
            continue
        expected = np.sum(shares[history], 0) + PRIOR * average
        expected /= expected.sum()
        assert tables.next_confidence_LH[2, history] == pytest.approx(expected.max(), abs=1e-3)
        assert expected[tables.next_ranks_LH[2, history]] == pytest.approx(expected.max(), abs=1e-9)


def test_labels_are_the_majority_and_ties_go_by_weight():
    home_E = np.array([0, 0, 1, 1, 2, 2])
    ids = np.array([[0, 1, 2], [0, 2, 4], [5, 4, 0]])
    weights = np.array([[0.1, 0.1, 0.8], [0.2, 0.3, 0.5], [0.0, 0.0, 1.0]], np.float16)
    assert labels(ids, weights, home_E, 3).tolist() == [0, 2, 2]
    np.testing.assert_allclose(rank_shares(ids, home_E, 3)[0], [2 / 3, 1 / 3, 0])


@pytest.mark.parametrize("tokens, ranks", [(64, 4), (13, 4), (3, 4), (1, 1)])
def test_tokens_are_put_evenly_and_nobody_would_be_taken_elsewhere(tokens: int, ranks: int):
    score = np.random.default_rng(0).random((tokens, ranks))
    rank_N = put(score)
    room = -(-tokens // ranks)
    assert np.bincount(rank_N, minlength=ranks).max() <= room
    for i, j in itertools.product(range(tokens), range(ranks)):
        if score[i, j] > score[i, rank_N[i]]:
            there = score[rank_N == j, j]
            assert len(there) == room and (there >= score[i, j]).all()


def local_share(
    ids_LNK: Int[np.ndarray, "L N K"], rank_LN: Int[np.ndarray, "L N"], home_LE: Int[np.ndarray, "L E"]
) -> float:
    """Returns the local activation rate: the share of activations whose expert is on their token's rank."""
    pairs = zip(ids_LNK, rank_LN, home_LE, strict=True)
    return float(np.mean([home_E[ids_NK] == rank_N[:, None] for ids_NK, rank_N, home_E in pairs]))


def test_the_tables_put_tokens_where_their_experts_are():
    profile, home_LE = planted(16, 4, requests=30)
    placement = group(profile, ranks=4)
    assert placement.tables is not None and placement.tables.shares_LVR is not None
    text = planted_requests(home_LE, 5, seed=77)
    tokens_N = np.concatenate([r.tokens_N for r in text])
    ids_LNK = np.concatenate([r.ids_LNK for r in text], axis=1)
    rank_LN = np.stack([put(share_VR[tokens_N]) for share_VR in placement.tables.shares_LVR])
    assert local_share(ids_LNK, rank_LN, placement.home_LE) > 0.8
    random = group(profile, ranks=4, method="random")
    assert local_share(ids_LNK, rank_LN, random.home_LE) < 0.4


def test_tables_are_saved_with_their_placement_and_must_fit_it(tmp_path):
    profile, _ = planted(8, 4)
    placement = group(profile, ranks=4)
    placement.save(tmp_path / "p.npz")
    loaded = Placement.load(tmp_path / "p.npz")
    assert placement.tables is not None and loaded.tables is not None
    for name, array in vars(placement.tables).items():
        np.testing.assert_array_equal(getattr(loaded.tables, name), array)
    with np.load(tmp_path / "p.npz") as arrays:
        np.savez(tmp_path / "q.npz", **{k: v for k, v in arrays.items() if k != "tables_ranks_LV"})
    with pytest.raises(ValueError, match=r"q\.npz is not a placement: tables_ranks_LV"):
        Placement.load(tmp_path / "q.npz")
    with pytest.raises(ValueError, match=r"table ranks_LV must be \[2, 40\], it is \[3, 40\]"):
        Placement(placement.experts_LP[:2], 4, "m", placement.tables)
    with pytest.raises(ValueError, match=r"shares_LVR must be \[3, 40, 2\], it is \[3, 40, 4\]"):
        Placement(placement.experts_LP, 2, "m", placement.tables)


@pytest.mark.parametrize("name", SHARES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -0.5, 1.5])
def test_tables_hold_shares(name, value):
    placement = group(planted(8, 4)[0], ranks=4)
    table = getattr(placement.tables, name).copy()
    table.flat[table.size // 2] = value
    tables = dataclasses.replace(placement.tables, **{name: table})
    with pytest.raises(ValueError, match=f"table {name} must hold shares, numbers from 0 to 1"):
        Placement(placement.experts_LP, 4, "m", tables)


def test_tables_name_ranks_by_integers():
    placement = group(planted(8, 4)[0], ranks=4)
    tables = dataclasses.replace(placement.tables, ranks_LV=placement.tables.ranks_LV.astype(np.float32))
    with pytest.raises(ValueError, match="ranks by integers, found float32"):
        Placement(placement.experts_LP, 4, "m", tables)
