"""Tests the worth of experts and the moves against naive rules; numpy and jax decide alike."""

from functools import partial
from itertools import pairwise
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.oracle import KnownOutlook, belady

from jmoe.config.techniques import Eviction
from jmoe.offload import policy, slot_table
from jmoe.offload.policy import LEAST, RULES, Outlook, UseHistory
from jmoe.offload.slot_table import CacheSettings, Copies, SlotTable
from jmoe.offload.types import Forecast

L, E, A = 3, 4, 2
X = L * E
few = settings(max_examples=60, deadline=None)


def test_the_config_names_the_rules():
    assert tuple(RULES) == get_args(Eviction)


def random_outlook(rng: np.random.Generator) -> Outlook:
    """Returns an outlook with few distinct probabilities, 0 among them, so that there are ties."""
    p_LE, heat_LE = (rng.integers(0, 4, (L, E)).astype(np.float32) / 4 for _ in range(2))
    return Outlook(p_LE, rng.random((L, E)) < 0.5, heat_LE)


def random_usage(rng: np.random.Generator) -> UseHistory:
    clock = int(rng.integers(5, 40))
    last_X = rng.integers(0, clock, X).astype(np.int32)
    return UseHistory(
        rng.integers(0, 4, X).astype(np.float32), last_X, np.array(clock, np.int32), rng.random(X) < 0.3
    )


def naive_worth(eviction: str, usage: UseHistory, outlook: Outlook, layer: int) -> list[float]:
    """Computes worth as the module's text states it, expert by expert."""
    worth = []
    for flat in range(X):
        its, expert = divmod(flat, E)
        p, visits = float(outlook.p_LE[its, expert]), max(1.0, float(usage.visits_X[flat]))
        soon = layer < its <= layer + A
        if eviction == "expected_use":
            likely = max(float(outlook.heat_LE[its, expert]), p if soon else 0.0)
            worth.append(likely / (its - layer if its > layer else its - layer + L))
        elif soon and outlook.wanted_LE[its, expert] and p > 0:
            worth.append(p / (its - layer))
        elif eviction == "expert_map":
            worth.append(-1 / (max(p, LEAST) * visits))
        elif eviction == "lru":
            worth.append(float(usage.last_X[flat]) - int(usage.clock) - 1)
        else:
            worth.append(-1 / visits)
    return worth


@given(st.integers(0, 2**32 - 1), st.sampled_from([*RULES]), st.integers(-1, L - 1))
@few
def test_worth_is_the_wish_above_zero_and_the_rule_below(seed: int, eviction, layer: int):
    rng = np.random.default_rng(seed)
    usage, outlook = random_usage(rng), random_outlook(rng)
    found_X = RULES[eviction](usage, outlook, np.int32(layer), A)
    assert found_X.dtype == np.float32
    np.testing.assert_allclose(found_X, naive_worth(eviction, usage, outlook, layer), rtol=1e-6)


@given(st.integers(0, 2**32 - 1), st.integers(-1, L - 1), st.integers(1, 4))
@few
def test_known_uses_are_ranked_as_belady_does(seed: int, layer: int, steps: int):
    """The expert that is needed last is evicted first.

    An expert is needed in this step, in a layer still to come, or ``due`` steps after it.
    """
    rng = np.random.default_rng(seed)
    outlook = KnownOutlook(*random_outlook(rng), rng.integers(1, steps + 1, (L, E)).astype(np.int32))
    found_X = belady(random_usage(rng), outlook, np.int32(layer), A)
    now = [divmod(flat, E) for flat in range(X)]
    until = [
        its if its > layer and outlook.p_LE[its, e] > 0 else its + L * int(outlook.due_LE[its, e])
        for its, e in now
    ]
    for a in range(X):
        for b in range(X):
            assert (found_X[a] > found_X[b]) == (until[a] < until[b]), (a, b)


@given(st.integers(0, 2**32 - 1), st.integers(-1, L - 1), st.integers(1, 6), st.sampled_from([*RULES]))
@few
def test_prefetches_are_the_experts_worth_most_of_the_layers_ahead(
    seed: int, layer: int, count: int, eviction
):
    rng = np.random.default_rng(seed)
    usage, outlook, present_X = random_usage(rng), random_outlook(rng), rng.random(X) < 0.4
    worth_X = RULES[eviction](usage, outlook, np.int32(layer), A)
    experts_M, gain_M = policy.best_prefetches(
        worth_X, outlook, np.int32(layer), present_X, distance=A, count=count
    )
    ahead = range((layer + 1) * E, min(layer + 1 + A, L) * E)
    may = [x for x in ahead if outlook.wanted_LE.reshape(-1)[x] and not present_X[x] and worth_X[x] > 0]
    want = sorted(may, key=lambda x: (-worth_X[x], x))[:count]
    assert experts_M.tolist() == want + [X] * (min(count, A * E) - len(want))
    assert gain_M[: len(want)].tolist() == worth_X[want].tolist()
    assert (np.diff(gain_M[: len(want)]) <= 0).all() and (gain_M[len(want) :] == -np.inf).all()


@given(st.integers(0, 2**32 - 1), st.integers(0, L + 1))
@few
def test_a_forecast_replaces_what_it_covers_and_nothing_else(seed: int, first: int):
    rng = np.random.default_rng(seed)
    outlook = random_outlook(rng)
    p_AE, wanted_AE = rng.random((A, E)).astype(np.float32), rng.random((A, E)) < 0.5
    found = policy.set_forecast(outlook, np.int32(first), p_AE, wanted_AE)
    for its in range(L):
        is_forecast = first <= its < first + A
        p_E, wanted_E = (p_AE, wanted_AE) if is_forecast else (outlook.p_LE, outlook.wanted_LE)
        row = its - first if is_forecast else its
        np.testing.assert_array_equal(found.p_LE[its], p_E[row])
        np.testing.assert_array_equal(found.wanted_LE[its], wanted_E[row])


def test_heat_is_a_running_mean_of_its_layer_alone():
    outlook = random_outlook(np.random.default_rng(0))
    scores_E = np.array([1, 0, 0.5, 0.25], np.float32)
    found = policy.add_scores(outlook, np.int32(1), scores_E)
    np.testing.assert_allclose(found.heat_LE[1], 0.9 * outlook.heat_LE[1] + 0.1 * scores_E, rtol=1e-6)
    np.testing.assert_array_equal(found.heat_LE[[0, 2]], outlook.heat_LE[[0, 2]])
    assert found.heat_LE.dtype == np.float32 and found.p_LE is outlook.p_LE


def test_visits_count_from_arrival_and_a_prefetch_is_useful_once():
    usage = policy.unused(X, np)
    nobody_X, one_X = np.zeros(X, bool), np.arange(X) == 1
    usage = policy.arrive(usage, nobody_X, one_X, is_prefetch=True)
    assert np.flatnonzero(usage.fetched_X).tolist() == [1]
    for _ in range(3):
        usage = policy.use(usage, one_X)
    assert usage.visits_X[1] == 3 and usage.last_X[1] == 2 and usage.clock == 3 and not usage.fetched_X.any()
    usage = policy.arrive(usage, one_X, nobody_X, is_prefetch=False)
    usage = policy.arrive(usage, nobody_X, one_X, is_prefetch=False)
    assert usage.visits_X[1] == 0 and usage.last_X[1] == 3 and not usage.fetched_X.any()
    fetched = policy.arrive(usage, one_X, one_X | (np.arange(X) == 2), is_prefetch=True)
    gone = policy.arrive(fetched, np.arange(X) == 2, nobody_X, is_prefetch=False)
    assert fetched.fetched_X[2] and not gone.fetched_X.any(), "evicted before its use: never useful"


def held(table: SlotTable) -> set[int]:
    return {int(x) for x in table.slots.held_S if x < X}


def moved(moves: Copies) -> dict[int, int]:
    pairs = zip(
        moves.experts_M[: moves.num_copies].tolist(), moves.slots_M[: moves.num_copies].tolist(), strict=True
    )
    return dict(pairs)


def test_a_pool_is_filled_with_what_is_used_most():
    often_LE = np.random.default_rng(0).integers(0, 5, (L, E)).astype(np.float32)
    for slots in (1, 5, X):
        table, moves = slot_table.fill(slot_table.new_table(slots, L, E, np), often_LE)
        best = sorted(range(X), key=lambda x: (-often_LE.reshape(-1)[x], x))[:slots]
        assert moved(moves) == {x: i for i, x in enumerate(best)}
        assert held(table) == set(best) and not table.slots.flying_S.any() and moves.num_evictions == 0


ODD = np.array([np.nan, np.inf, -np.inf, 2.0, -1.0, 1e-42, 2e-38], np.float32)  # no sane scores


def one_step(
    rng: np.random.Generator,
    cache_settings: CacheSettings,
    slots: int,
    xp=np,
    steps: int = 3,
    *,
    odd: bool = False,
) -> list:
    """Returns every state and move of some steps of decode decisions on random needs and forecasts.

    odd: whether half of the forecasts and scores are NaN, or no probability.
    """

    def spoiled(values: np.ndarray) -> np.ndarray:
        spoils = rng.random(values.shape) < 0.5 if odd else np.zeros(values.shape, bool)
        return np.where(spoils, rng.choice(ODD, values.shape), values).astype(np.float32)

    jitted = jax.jit if xp is jnp else (lambda f, **_: f)
    set_forecast, prefetch = (
        jitted(slot_table.set_forecast),
        jitted(partial(slot_table.prefetch, settings=cache_settings)),
    )
    demand = jitted(partial(slot_table.demand, settings=cache_settings, max_experts=E))
    finish = jitted(slot_table.finish_layer)
    table, seen = slot_table.fill(
        slot_table.new_table(slots, L, E, xp), xp.asarray(rng.random((L, E)), dtype="float32")
    )
    trail = [(table, seen, None)]
    for _ in range(steps):
        for layer in range(-1, L):
            p_AE = rng.integers(0, 4, (A, E)).astype(np.float32) / 4
            forecast = Forecast(xp.asarray(spoiled(p_AE)), xp.asarray(rng.random((A, E)) < 0.6))
            needed_E = xp.asarray(rng.random(E) < 0.5)
            at = xp.asarray(layer, dtype="int32")
            table = set_forecast(table, at + 1, forecast)
            if layer >= 0:
                table, missing = demand(table, needed_E=needed_E, layer=at)
                trail.append((table, missing, (layer, needed_E)))
            table, prefetches = prefetch(table, layer=at)
            trail.append((table, prefetches, None))
            if layer >= 0:
                table = finish(table, needed_E, xp.asarray(spoiled(rng.random(E))), at)
            else:
                table = table._replace(slots=table.slots._replace(flying_S=table.slots.flying_S & False))
            trail.append((table, None, None))
    return trail


@pytest.mark.parametrize("eviction", RULES)
@pytest.mark.parametrize("slots", [2, 5, 9, X])
@pytest.mark.parametrize("odd", [False, True], ids=["", "odd"])
def test_decisions_of_whole_steps(eviction, slots: int, odd: bool):
    """After its demand a layer has what it needs, as far as slots suffice; a prefetch takes none of it."""
    for seed in range(10):
        trail = one_step(np.random.default_rng(seed), CacheSettings(RULES[eviction], 2, A), slots, odd=odd)
        assert all(
            np.isfinite(t.outlook.heat_LE).all() and np.isfinite(t.outlook.p_LE).all() for t, *_ in trail
        )
        for (before, *_), (after, moves, needs) in pairwise(trail):
            if moves is None:
                assert held(after) == held(before) and not after.slots.flying_S.any()
                continue
            new = moved(moves)
            assert new.keys() == held(after) - held(before)
            assert moves.num_evictions == len(held(before) - held(after))
            assert all(after.slots.held_S[slot] == x for x, slot in new.items())
            if needs is None:  # a prefetch
                assert all(after.slots.flying_S[slot] for slot in new.values()) and len(new) <= 2
                assert set(held(before) - held(after)).isdisjoint(
                    {int(x) for x in before.slots.held_S[before.slots.pinned_S]}
                )
                continue
            layer, needed_E = needs
            needed = {layer * E + e for e in np.flatnonzero(needed_E)}
            there = needed & held(after)
            assert len(there) == min(len(needed), max(slots, len(needed & held(before))))
            assert needed & held(before) <= there
            assert {int(x) for x in after.slots.held_S[after.slots.pinned_S]} == there
            lacking = sorted(needed - held(before))
            assert sorted(new) == lacking[: len(new)], "the first ones, where slots run out"


@pytest.mark.parametrize("eviction", RULES)
@pytest.mark.parametrize("odd", [False, True], ids=["", "odd"])
def test_jax_decides_as_numpy_does_bit_for_bit(eviction, odd: bool):
    for seed in range(3):
        ours, theirs = (
            one_step(np.random.default_rng(seed), CacheSettings(RULES[eviction], 2, A), 5, xp, odd=odd)
            for xp in (np, jnp)
        )
        for (a, moves, _), (b, same_moves, _) in zip(ours, theirs, strict=True):
            for want, got in zip(jax.tree.leaves((a, moves)), jax.tree.leaves((b, same_moves)), strict=True):
                assert np.asarray(want).dtype == got.dtype
                np.testing.assert_array_equal(want, got)
