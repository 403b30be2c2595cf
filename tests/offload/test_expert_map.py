"""Tests expert maps against numpy: selection, the store, search, and learning from a step."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models.routed import K, embeddings
from support.oracles.forecasts import (
    PROFILE,
    A,
    D,
    E,
    L,
    distributions,
    layers_of,
    np_cosine,
    sizes,
    step_of,
    store_of,
    walked,
)

from jmoe.offload.predictors.base import PredictorInputs
from jmoe.offload.predictors.expert_map import ExpertMaps
from jmoe.offload.predictors.forecasts import over_batch, top, until
from jmoe.offload.predictors.make import make_predictor
from jmoe.offload.predictors.map_store import MapStore, insert

# ---- selection


def np_until(p_E: np.ndarray, mass: float, k: int) -> set[int]:
    wanted: list[int] = []
    for expert in sorted(range(len(p_E)), key=lambda e: (-p_E[e], e)):
        if len(wanted) >= k and p_E[wanted].sum() >= mass:
            break
        wanted.append(expert)
    return set(wanted)


def test_selection_takes_the_expert_that_crosses_and_never_fewer_than_k():
    p_E = np.array([8, 4, 2, 1, 1, 0, 0, 0], np.float32) / 16
    for mass, k, expected in (
        (0.0, 2, {0, 1}),
        (1.0, 2, {0, 1, 2, 3, 4}),  # the whole mass, and no expert without any
        (0.75, 2, {0, 1}),  # k experts reach it exactly
        (0.76, 2, {0, 1, 2}),
        (0.0, 1, {0}),
        (0.9, 1, {0, 1, 2, 3}),  # among equals the lower id
        (0.2, 8, set(range(8))),
        (0.2, 9, set(range(8))),
    ):
        found = until(jnp.asarray(p_E), jnp.asarray(mass, jnp.float32), k)
        assert set(np.flatnonzero(found)) == expected == np_until(p_E, mass, k), (mass, k)


@given(st.lists(st.integers(0, 8), min_size=E, max_size=E), st.integers(0, 32), st.integers(1, E))
@settings(max_examples=40, deadline=None)
def test_selection_is_that_of_a_loop_with_ties(parts: list[int], mass: int, k: int):
    p_E = np.array(parts, np.float32) / 32  # exact sums
    found = until(jnp.asarray(p_E)[None, None], jnp.full((1, 1), mass / 32, jnp.float32), k)[0, 0]
    wanted = np_until(p_E, mass / 32, k)
    assert set(np.flatnonzero(found)) == wanted
    best = sorted(range(E), key=lambda e: (-p_E[e], e))[:k]
    assert set(np.flatnonzero(top(jnp.asarray(p_E), k))) == {e for e in best if p_E[e] > 0}


def test_a_batch_wants_what_any_valid_row_wants_and_padding_says_nothing():
    p_BAE = np.array([[[0.5, 0.2]], [[0.1, 0.4]], [[np.nan, 1.0]]], np.float32)
    wanted_BAE = np.array([[[1, 0]], [[1, 0]], [[1, 1]]], bool)
    found = over_batch(jnp.asarray(p_BAE), jnp.asarray(wanted_BAE), jnp.array([True, True, False]))
    np.testing.assert_array_equal(found.p_AE, np.float32([[0.5, 0.4]]))
    np.testing.assert_array_equal(found.wanted_AE, [[True, False]])


# ---- the store


def np_insert(entries: list[tuple], new: tuple, capacity: int, distance: int) -> None:
    """Inserts new entries as fMoE, section 2.2, says."""
    if len(entries) < capacity:
        entries.append(new)
        return
    rdy = [
        distance / L * np_cosine(new[0], key) + (L - distance) / L * np_cosine(new[1], maps)
        for key, maps in entries
    ]
    entries[int(np.argmax(rdy))] = new


def test_insertion_fills_and_then_overwrites_the_most_redundant():
    rng = np.random.default_rng(0)
    store, entries = MapStore.empty(6, L, E, D), []
    one = jax.jit(insert, static_argnums=3)
    for i in range(30):
        new = (rng.standard_normal(D).astype(np.float32), distributions(rng, L))
        store = one(store, *new, A)
        np_insert(entries, new, 6, A)
        assert int(store.used_C.sum()) == min(i + 1, 6)
        for place, (key, map_LE) in enumerate(entries):
            np.testing.assert_allclose(store.keys_CD[place], key / np.linalg.norm(key), atol=1e-6)
            np.testing.assert_array_equal(store.maps_CLE[place], map_LE)
            np.testing.assert_allclose(store.squares_CL[place], (map_LE**2).sum(1), rtol=1e-5)


def test_equal_new_entries_go_one_after_the_other():
    """The second of two equal entries meets the first in the store and takes its place, not a third one's."""
    rng = np.random.default_rng(1)
    _, embeddings_CD, maps_CLE = store_of(rng, 4, 4)
    new = (rng.standard_normal(D).astype(np.float32), distributions(rng, L))
    twice = [
        np.concatenate([old, [one, one]]) for old, one in zip((embeddings_CD, maps_CLE), new, strict=True)
    ]
    store = MapStore.build(*twice, 4, A)
    entries: list[tuple] = []
    for each in zip(*twice, strict=True):
        np_insert(entries, each, 4, A)
    np.testing.assert_array_equal(store.maps_CLE, [maps for _, maps in entries])
    assert sum((np.asarray(maps) == new[1]).all() for maps in store.maps_CLE) == 1
    room = MapStore.build(*(pair[-2:] for pair in twice), 4, A)
    assert room.used_C.tolist() == [True, True, False, False], "where there is room both are kept"


# ---- expert maps


def np_expert_map(cos_BC: np.ndarray, maps_CLE: np.ndarray, first: int, valid: list[int], k: int) -> tuple:
    """Returns the forecast of layers first .. first + A - 1 from the similarities."""
    p_AE, wanted_AE = np.zeros((A, E), np.float32), np.zeros((A, E), bool)
    for row in np.flatnonzero(valid):
        best = int(np.argmax(cos_BC[row]))
        for a in range(min(A, L - first)):
            p_E = maps_CLE[best, first + a]
            p_AE[a] = np.maximum(p_AE[a], p_E)
            wanted_AE[a, list(np_until(p_E, np.clip(1 - cos_BC[row, best], 0, 1), k))] = True
    return p_AE, wanted_AE


@pytest.mark.parametrize("capacity", (12, 20))
def test_the_search_is_that_of_whole_prefixes_at_every_layer(capacity: int):
    rng, valid = np.random.default_rng(2), [1, 0, 1]
    store, embeddings_CD, maps_CLE = store_of(rng, 12, capacity)
    predictor = ExpertMaps.make(store, distance=A, k=K, is_online=False)
    seen, layers = step_of(rng, valid), layers_of(rng, 3)
    after, forecasts = walked(predictor, seen, layers)
    assert after is predictor, "offline nothing is learned"
    scores_BLE = np.stack([layer.scores_BE for layer in layers], 1)
    for first, found in enumerate(forecasts):
        cos_BC = np.array([
            [
                np_cosine(scores_BLE[b, :first], maps_CLE[c, :first])
                if first
                else np_cosine(np.asarray(seen.embeddings_BD)[b], embeddings_CD[c])
                for c in range(12)
            ]
            for b in range(3)
        ])  # fmt: skip
        p_AE, wanted_AE = np_expert_map(cos_BC, maps_CLE, first, valid, K)
        np.testing.assert_array_equal(found.p_AE, p_AE)
        np.testing.assert_array_equal(found.wanted_AE, wanted_AE)
        assert wanted_AE.sum(1)[: L - first].tolist() >= [K] * min(A, L - first)


def test_the_running_cosines_do_not_drift():
    rng = np.random.default_rng(3)
    store, _, maps_CLE = store_of(rng, 12, 12)
    predictor, layers = ExpertMaps.make(store, distance=A, k=K, is_online=False), layers_of(rng, 2)
    state, _ = predictor.start(step_of(rng, [1, 1]))
    for i, layer in enumerate(layers):
        state, _ = predictor.observe(state, jnp.asarray(i, jnp.int32), layer)
        past_BLE = np.stack([seen.scores_BE for seen in layers[: i + 1]], 1)
        np.testing.assert_allclose(
            state.dots_BC, np.einsum("ble,cle->bc", past_BLE, maps_CLE[:, : i + 1]), rtol=1e-5
        )
        np.testing.assert_allclose(state.squares_B, (past_BLE**2).sum((1, 2)), rtol=1e-5)
        np.testing.assert_allclose(state.entry_squares_C, (maps_CLE[:, : i + 1] ** 2).sum((1, 2)), rtol=1e-5)


def test_online_one_row_a_step_is_learned_in_turn_and_an_empty_store_expects_nothing():
    rng = np.random.default_rng(4)
    predictor = ExpertMaps.make(MapStore.empty(4, L, E, D), distance=A, k=K, is_online=True)
    step = jax.jit(walked)
    kept = []
    for valid, row in (([0, 1, 1], 1), ([0, 1, 1], 2), ([0, 0, 0], None), ([1, 1, 1], 0)):
        seen, layers = step_of(rng, valid), layers_of(rng, 3)
        predictor, forecasts = step(predictor, seen, layers)
        if not kept:
            assert all(not f.p_AE.any() and not f.wanted_AE.any() for f in forecasts)
        elif row is not None:
            assert forecasts[0].wanted_AE.sum() >= A * K
        else:
            assert all(not f.p_AE.any() and not f.wanted_AE.any() for f in forecasts), "padding alone"
        if row is not None:
            kept.append((np.asarray(seen.embeddings_BD)[row], [layer.scores_BE[row] for layer in layers]))
        assert int(predictor.store.used_C.sum()) == len(kept)
    for place, (embedding, map_LE) in enumerate(kept):
        np.testing.assert_allclose(
            predictor.store.keys_CD[place], embedding / np.linalg.norm(embedding), atol=1e-6
        )
        np.testing.assert_array_equal(predictor.store.maps_CLE[place], map_LE)


def test_what_a_step_learns_takes_the_place_that_a_comparison_of_everything_says():
    rng = np.random.default_rng(9)
    store, _, _ = store_of(rng, 12, 12)
    predictor, step = ExpertMaps.make(store, distance=A, k=K, is_online=True), jax.jit(walked)
    for turn in range(12):
        seen, layers = step_of(rng, [0, 1, 1]), layers_of(rng, 3)
        row = 1 + turn % 2
        predictor, _ = step(predictor, seen, layers)
        store = insert(
            store, seen.embeddings_BD[row], jnp.stack([layer.scores_BE[row] for layer in layers]), A
        )
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), predictor.store, store)


def test_a_profiles_iterations_fill_the_store():
    predictor = make_predictor("expert_map", sizes(store_size=30), PredictorInputs(PROFILE, embeddings()))
    sample = PROFILE.sample
    assert predictor.store.used_C.tolist() == [True] * 24 + [False] * 6 and not predictor.is_online
    key_ID = embeddings()[sample.map_tokens_QM.ravel()]
    key_ID /= np.linalg.norm(key_ID, axis=1, keepdims=True)
    expected = np.concatenate([key_ID, sample.maps_QMLE.reshape(24, -1)], 1)
    found = np.concatenate([predictor.store.keys_CD[:24], predictor.store.maps_CLE[:24].reshape(24, -1)], 1)
    same = np.abs(expected[:, None] - found).max(2) < 1e-6
    assert (same.sum(0) >= 1).all() and (same.sum(1) >= 1).all(), "each once, in another order"
    assert not same.diagonal().all()
    short = replace(sample, map_tokens_QM=np.where(np.arange(2) < 1, sample.map_tokens_QM, -1))
    some = make_predictor(
        "expert_map", sizes(), PredictorInputs(replace(PROFILE, sample=short), embeddings())
    )
    assert int(some.store.used_C.sum()) == 12, "positions that are none are no iterations"
