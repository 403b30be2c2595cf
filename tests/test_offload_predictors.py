"""Predictors of expert offload against numpy: stores, search, selection, tables, and what a step changes."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routed import LAYERS, VOCAB, K, embeddings, planted

from jmoe.offload.choose import over_batch, top, until
from jmoe.offload.expert_map import ExpertMaps
from jmoe.offload.map_store import MapStore, insert
from jmoe.offload.predictors import NAMES, Given, make_predictor
from jmoe.offload.request_counts import RequestCounts
from jmoe.offload.token_table import TokenTable
from jmoe.offload.types import Forecast, LayerSeen, Predictor, StepSeen

L, E, D, A = 5, 8, 6, 2
PROFILE, _ = planted()


def distributions(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.dirichlet(np.full(E, 0.3), shape).astype(np.float32)


def store_of(
    rng: np.random.Generator, entries: int, capacity: int
) -> tuple[MapStore, np.ndarray, np.ndarray]:
    """A store, and the embeddings and maps of its entries."""
    embeddings_CD = rng.standard_normal((entries, D)).astype(np.float32)
    maps_CLE = distributions(rng, entries, L)
    return MapStore.build(embeddings_CD, maps_CLE, capacity, A), embeddings_CD, maps_CLE


def step_of(rng: np.random.Generator, valid: list[int], tokens: list[int] | None = None) -> StepSeen:
    b = len(valid)
    tokens_B = rng.integers(0, VOCAB, b) if tokens is None else np.array(tokens)
    return StepSeen(
        jnp.asarray(tokens_B, jnp.int32),
        jnp.asarray(rng.standard_normal((b, D)), jnp.float32),
        jnp.asarray(valid, bool),
        jnp.arange(b, dtype=jnp.int32),
    )


def layers_of(rng: np.random.Generator, b: int, layers: int = L, k: int = K) -> list[LayerSeen]:
    scores_LBE = distributions(rng, layers, b)
    ids_LBK = np.argsort(-scores_LBE, axis=2)[:, :, :k].astype(np.int32)
    ahead_LBAE = distributions(rng, layers, b, A)
    return [
        LayerSeen(*map(jnp.asarray, layer)) for layer in zip(scores_LBE, ids_LBK, ahead_LBAE, strict=True)
    ]


def walked(predictor: Predictor, seen: StepSeen, layers: list[LayerSeen]) -> tuple[Predictor, list[Forecast]]:
    """One step, layer by layer."""
    walk, forecast = predictor.start(seen)
    forecasts = [forecast]
    for i, layer in enumerate(layers):
        walk, forecast = predictor.observe(walk, jnp.asarray(i, jnp.int32), layer)
        forecasts.append(forecast)
    return predictor.finish(walk), forecasts


def np_cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


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
        (1.0, 2, {0, 1, 2, 3, 4}),  # the whole mass, and not one without any
        (0.75, 2, {0, 1}),  # exactly reached by k
        (0.76, 2, {0, 1, 2}),
        (0.0, 1, {0}),
        (0.9, 1, {0, 1, 2, 3}),  # of equals the lower id
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
    """fMoE section 2.2, restated."""
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
    """Of two equal ones the second meets the first in the store, and takes its place, not another one's."""
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
    """The forecast of layers first .. first + A - 1 from the similarities."""
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
    predictor = ExpertMaps.make(store, distance=A, k=K, online=False)
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
    predictor, layers = ExpertMaps.make(store, distance=A, k=K, online=False), layers_of(rng, 2)
    walk, _ = predictor.start(step_of(rng, [1, 1]))
    for i, layer in enumerate(layers):
        walk, _ = predictor.observe(walk, jnp.asarray(i, jnp.int32), layer)
        past_BLE = np.stack([seen.scores_BE for seen in layers[: i + 1]], 1)
        np.testing.assert_allclose(
            walk.dots_BC, np.einsum("ble,cle->bc", past_BLE, maps_CLE[:, : i + 1]), rtol=1e-5
        )
        np.testing.assert_allclose(walk.squares_B, (past_BLE**2).sum((1, 2)), rtol=1e-5)
        np.testing.assert_allclose(walk.entry_squares_C, (maps_CLE[:, : i + 1] ** 2).sum((1, 2)), rtol=1e-5)


def test_online_one_row_a_step_is_learned_in_turn_and_an_empty_store_expects_nothing():
    rng = np.random.default_rng(4)
    predictor = ExpertMaps.make(MapStore.empty(4, L, E, D), distance=A, k=K, online=True)
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
    predictor, step = ExpertMaps.make(store, distance=A, k=K, online=True), jax.jit(walked)
    for turn in range(12):
        seen, layers = step_of(rng, [0, 1, 1]), layers_of(rng, 3)
        row = 1 + turn % 2
        predictor, _ = step(predictor, seen, layers)
        store = insert(
            store, seen.embeddings_BD[row], jnp.stack([layer.scores_BE[row] for layer in layers]), A
        )
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), predictor.store, store)


def test_a_profiles_iterations_fill_the_store():
    predictor = make_predictor(
        "expert_map", **sizes(), profile=PROFILE, embeddings_VD=embeddings(), capacity=30
    )
    sample = PROFILE.sample
    assert predictor.store.used_C.tolist() == [True] * 24 + [False] * 6 and not predictor.online
    key_ID = embeddings()[sample.map_tokens_QM.ravel()]
    key_ID /= np.linalg.norm(key_ID, axis=1, keepdims=True)
    expected = np.concatenate([key_ID, sample.maps_QMLE.reshape(24, -1)], 1)
    found = np.concatenate([predictor.store.keys_CD[:24], predictor.store.maps_CLE[:24].reshape(24, -1)], 1)
    same = np.abs(expected[:, None] - found).max(2) < 1e-6
    assert (same.sum(0) >= 1).all() and (same.sum(1) >= 1).all(), "each once, in another order"
    assert not same.diagonal().all()
    short = replace(sample, map_tokens_QM=np.where(np.arange(2) < 1, sample.map_tokens_QM, -1))
    some = make_predictor(
        "expert_map", **sizes(), profile=replace(PROFILE, sample=short), embeddings_VD=embeddings()
    )
    assert int(some.store.used_C.sum()) == 12, "positions that are none are no iterations"


# ---- the other predictors


def sizes(**changes: int) -> dict[str, int]:
    return {"distance": A, "k": K, "layers": LAYERS, "experts": E, "seats": 3} | changes


def np_top(p_BLE: np.ndarray, valid: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The batch's forecast of all layers from each row's: top k, and the maximum."""
    rows = p_BLE[np.array(valid, bool)]
    wanted = np.zeros(rows.shape, bool)
    np.put_along_axis(wanted, np.argsort(-rows, axis=2, kind="stable")[:, :, :K], True, 2)
    return rows.max(0), (wanted & (rows > 0)).any(0)


def check_plan(forecasts: list[Forecast], p_LE: np.ndarray, wanted_LE: np.ndarray) -> None:
    """Every forecast is the next A rows of one of all layers, and nothing past the last."""
    for first, found in enumerate(forecasts):
        n = min(A, len(p_LE) - first)
        np.testing.assert_allclose(found.p_AE[:n], p_LE[first : first + n], atol=1e-6)
        np.testing.assert_array_equal(found.wanted_AE[:n], wanted_LE[first : first + n])
        assert not found.p_AE[n:].any() and not found.wanted_AE[n:].any()


def test_the_token_table_is_the_profiles_counts():
    rng, valid = np.random.default_rng(5), [1, 1, 0, 1]
    rare = int(np.argmin(np.where(PROFILE.frequency_V > 0, PROFILE.frequency_V, 10**9)))
    seen, layers = step_of(rng, valid, [4, 38, 7, rare]), layers_of(rng, 4, LAYERS)
    for rows in (4096, 37):  # with 37 of the 38 that occur, the rarest has the row of all tokens
        predictor = TokenTable.make(PROFILE, distance=A, k=K, rows=rows)
        share_BLE = (
            np.stack([PROFILE.chosen(layer, np.arange(VOCAB)) for layer in range(LAYERS)], 1)
            / np.maximum(PROFILE.frequency_V, 1)[:, None, None]
        )
        share_BLE = share_BLE[[4, 3, 7, rare]]  # 38 never occurs and is like 3
        if rows == 37:
            share_BLE[3] = PROFILE.loads_LE / PROFILE.tokens
        assert predictor.table_RLE.dtype == jnp.uint8 and len(predictor.table_RLE) == min(rows, 38) + 1
        check_plan(walked(predictor, seen, layers)[1], *np_top(np.rint(share_BLE * 255) / 255, valid))


def shares(counts_BLE: np.ndarray) -> np.ndarray:
    return counts_BLE / np.maximum(counts_BLE.sum(2, keepdims=True), 1)


def test_counts_match_a_seats_request_and_a_new_one_forgets_the_old():
    rng = np.random.default_rng(6)
    stored_QLE = rng.integers(0, 9, (10, LAYERS, E))
    predictor = RequestCounts.make(stored_QLE, seats=3, distance=A, k=K)
    past_QLE, counts_ZLE = shares(stored_QLE), np.zeros((3, LAYERS, E))

    def expected_LE(now_LE: np.ndarray) -> np.ndarray:
        if not now_LE.any():
            return past_QLE.mean(0)
        return past_QLE[np.argmax([np_cosine(now_LE, past_LE) for past_LE in past_QLE])]

    for i, (valid, fresh) in enumerate(
        (([1, 1, 0], [1, 0, 0]), ([1, 1, 1], [0, 1, 0]), ([0, 1, 1], [0, 0, 1]))
    ):
        piece_BLE = rng.integers(0, 5, (3, LAYERS, E)) * (np.arange(3) == i)[:, None, None]
        order = rng.permutation(3)
        predictor = predictor.absorb(
            jnp.asarray(order, jnp.int32),
            jnp.asarray(fresh, bool)[order],
            jnp.asarray(piece_BLE[order], jnp.float32),
        )
        counts_ZLE = counts_ZLE * (1 - np.array(fresh))[:, None, None] + piece_BLE
        seen, layers = step_of(rng, valid), layers_of(rng, 3, LAYERS)
        layers[0] = layers[0]._replace(ids_BK=layers[0].ids_BK.at[1, 0].set(E))  # goes nowhere
        wanted = np_top(np.stack([expected_LE(now_LE) for now_LE in shares(counts_ZLE)]), valid)
        predictor, forecasts = walked(predictor, seen, layers)
        check_plan(forecasts, *wanted)
        for layer, routed in enumerate(layers):
            for row in np.flatnonzero(valid):
                for expert in np.asarray(routed.ids_BK[row]):
                    if expert < E:
                        counts_ZLE[row, layer, expert] += 1
        np.testing.assert_array_equal(predictor.counts_ZLE, counts_ZLE)


def test_counts_without_a_profile_know_the_requests_own_past():
    rng, valid = np.random.default_rng(7), [1, 1, 1]
    predictor = make_predictor("counts", **sizes())
    seen, layers = step_of(rng, valid), layers_of(rng, 3, LAYERS)
    predictor, forecasts = walked(predictor, seen, layers)
    assert not any(f.wanted_AE.any() for f in forecasts)
    own_BLE = np.zeros((3, LAYERS, E))
    np.put_along_axis(own_BLE, np.stack([layer.ids_BK for layer in layers], 1), 1 / K, 2)
    check_plan(walked(predictor, seen, layers)[1], *np_top(own_BLE, valid))


def test_the_next_gate_the_oracle_and_none_say_what_they_are_given():
    rng, valid = np.random.default_rng(8), [1, 0, 1]
    seen, layers = step_of(rng, valid), layers_of(rng, 3, LAYERS)
    _, forecasts = walked(make_predictor("next_gate", **sizes()), seen, layers)
    assert not forecasts[0].wanted_AE.any() and not forecasts[0].p_AE.any(), "no gate input before layer 0"
    for layer, found in zip(layers, forecasts[1:], strict=True):
        p_AE, wanted_AE = np_top(np.asarray(layer.ahead_BAE), valid)
        np.testing.assert_array_equal(found.p_AE, p_AE)
        np.testing.assert_array_equal(found.wanted_AE, wanted_AE)
    with pytest.raises(ValueError, match="next_gate needs the scores"):
        walked(make_predictor("next_gate", **sizes()), seen, [layers[0]._replace(ahead_BAE=None)])
    needs_LE = rng.random((LAYERS, E)) < 0.4
    oracle = replace(Given(jnp.zeros((LAYERS, E), bool), A), needs_LE=jnp.asarray(needs_LE))
    check_plan(walked(oracle, seen, layers)[1], needs_LE.astype(float), needs_LE)
    _, forecasts = walked(make_predictor("none", **sizes()), seen, layers)
    assert all(not f.p_AE.any() and not f.wanted_AE.any() for f in forecasts)


# ---- all of them


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    (
        (
            "best",
            {},
            "unknown predictor 'best'; it can be one of expert_map, next_gate, token_table, counts, none",
        ),
        ("token_table", {}, "token_table needs a profile"),
        ("expert_map", {}, "expert_map needs the model's input embeddings"),
        ("none", {"distance": 0}, "looks 1 to 3 layers ahead, not 0"),
        ("none", {"capacity": 0}, "holds 1 iteration or more, not 0"),
        ("counts", {"experts": 16, "profile": PROFILE}, "the profile has 3 x 8 experts, the model 3 x 16"),
    ),
)
def test_what_no_predictor_can_be_made_of(name: str, changes: dict, message: str):
    with pytest.raises(ValueError, match=message) as error:
        make_predictor(name, **sizes() | changes)
    assert "\n" not in str(error.value)


def described(tree: object) -> object:
    return jax.tree.structure(tree), [
        (leaf.shape, leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(tree)
    ]


@partial(jax.jit, donate_argnums=0)
def scanned(predictor: Predictor, seen: StepSeen, layers: LayerSeen) -> tuple[Predictor, Forecast, Forecast]:
    """A step with its layers in a scan, as a compiled step walks them."""
    walk, first = predictor.start(seen)

    def one(walk: object, layer: tuple) -> tuple[object, Forecast]:
        return predictor.observe(walk, *layer)

    walk, rest = jax.lax.scan(one, walk, (jnp.arange(LAYERS, dtype=jnp.int32), layers))
    return predictor.finish(walk), first, rest


@pytest.mark.parametrize("name", (*NAMES, "expert_map online"))
@given(st.integers(0, 2**31), st.lists(st.integers(0, 1), min_size=3, max_size=3))
@settings(max_examples=8, deadline=None)
def test_structure_stays_and_jit_says_the_same(name: str, seed: int, valid: list[int]):
    rng, table = np.random.default_rng(seed), np.tile(embeddings(), (1, 2))[:, :D]
    profile = None if "online" in name else PROFILE
    predictor = make_predictor(name.split()[0], **sizes(), profile=profile, embeddings_VD=table, capacity=9)
    before = described(predictor)
    seen, layers = step_of(rng, valid), layers_of(rng, 3, LAYERS)
    args = seen.seats_B, seen.valid_B, jnp.asarray(rng.integers(0, 4, (3, LAYERS, E)), jnp.float32)
    predictor = predictor.absorb(*args)
    assert described(predictor) == before
    eager, forecasts = walked(predictor, seen, layers)
    assert described(eager) == before
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *layers)
    after, first, rest = scanned(jax.tree.map(jnp.copy, predictor), seen, stacked)
    assert described(after) == before == described(jax.jit(lambda p: p.absorb(*args))(predictor))
    found = jax.tree.map(lambda one, more: np.concatenate([one[None], more]), first, rest)
    expected = jax.tree.map(lambda *each: np.stack(each), *forecasts)
    np.testing.assert_allclose(found.p_AE, expected.p_AE, atol=1e-6)
    np.testing.assert_array_equal(found.wanted_AE, expected.wanted_AE)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), after, eager)
    assert found.p_AE.dtype == np.float32 and found.p_AE.shape == (LAYERS + 1, A, E)
