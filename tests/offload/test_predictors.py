"""Tests the other predictors against numpy, and all predictors' structure, jit and refusals."""

from dataclasses import replace
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.oracle import Oracle
from support.models.routed import LAYERS, VOCAB, K, embeddings
from support.oracles.forecasts import PROFILE, A, D, E, layers_of, np_cosine, sizes, step_of, walked

from jmoe.config.techniques import PredictorName
from jmoe.offload.predictors.base import PredictorInputs, PredictorSizes
from jmoe.offload.predictors.counts import RequestCounts
from jmoe.offload.predictors.make import PREDICTORS, make_predictor
from jmoe.offload.predictors.token_table import TokenTable
from jmoe.offload.types import Forecast, LayerView, Predictor, StepView

# ---- the other predictors


def np_top(p_BLE: np.ndarray, valid: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the batch's forecast of all layers from each row's: top k, and the maximum."""
    rows = p_BLE[np.array(valid, bool)]
    wanted = np.zeros(rows.shape, bool)
    np.put_along_axis(wanted, np.argsort(-rows, axis=2, kind="stable")[:, :, :K], True, 2)
    return rows.max(0), (wanted & (rows > 0)).any(0)


def check_plan(forecasts: list[Forecast], p_LE: np.ndarray, wanted_LE: np.ndarray) -> None:
    """Asserts that every forecast is the next A rows of a forecast of all layers, and nothing at the end."""
    for first, found in enumerate(forecasts):
        n = min(A, len(p_LE) - first)
        np.testing.assert_allclose(found.p_AE[:n], p_LE[first : first + n], atol=1e-6)
        np.testing.assert_array_equal(found.wanted_AE[:n], wanted_LE[first : first + n])
        assert not found.p_AE[n:].any() and not found.wanted_AE[n:].any()


def test_the_token_table_is_the_profiles_counts():
    rng, valid = np.random.default_rng(5), [1, 1, 0, 1]
    rare = int(np.argmin(np.where(PROFILE.frequency_V > 0, PROFILE.frequency_V, 10**9)))
    seen, layers = step_of(rng, valid, [4, 38, 7, rare]), layers_of(rng, 4, LAYERS)
    for rows in (4096, 37):  # with 37 rows for the 38 ids that occur, the rarest id has the row of all tokens
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
        predictor = predictor.add_prompts(
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
    predictor = make_predictor("counts", sizes())
    seen, layers = step_of(rng, valid), layers_of(rng, 3, LAYERS)
    predictor, forecasts = walked(predictor, seen, layers)
    assert not any(f.wanted_AE.any() for f in forecasts)
    own_BLE = np.zeros((3, LAYERS, E))
    np.put_along_axis(own_BLE, np.stack([layer.ids_BK for layer in layers], 1), 1 / K, 2)
    check_plan(walked(predictor, seen, layers)[1], *np_top(own_BLE, valid))


def test_the_next_gate_the_oracle_and_none_say_what_they_are_given():
    rng, valid = np.random.default_rng(8), [1, 0, 1]
    seen, layers = step_of(rng, valid), layers_of(rng, 3, LAYERS)
    _, forecasts = walked(make_predictor("next_gate", sizes()), seen, layers)
    assert not forecasts[0].wanted_AE.any() and not forecasts[0].p_AE.any(), "no gate input before layer 0"
    for layer, found in zip(layers, forecasts[1:], strict=True):
        p_AE, wanted_AE = np_top(np.asarray(layer.next_scores_BAE), valid)
        np.testing.assert_array_equal(found.p_AE, p_AE)
        np.testing.assert_array_equal(found.wanted_AE, wanted_AE)
    with pytest.raises(ValueError, match="next_gate needs the scores"):
        walked(make_predictor("next_gate", sizes()), seen, [layers[0]._replace(next_scores_BAE=None)])
    needs_LE = rng.random((LAYERS, E)) < 0.4
    oracle = replace(Oracle(jnp.zeros((LAYERS, E), bool), A), needs_LE=jnp.asarray(needs_LE))
    check_plan(walked(oracle, seen, layers)[1], needs_LE.astype(float), needs_LE)
    _, forecasts = walked(make_predictor("none", sizes()), seen, layers)
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
        ("none", {"store_size": 0}, "holds 1 iteration or more, not 0"),
        ("counts", {"experts": 16, "profile": PROFILE}, "the profile has 3 x 8 experts, the model 3 x 16"),
    ),
)
def test_what_no_predictor_can_be_made_of(name: str, changes: dict, message: str):
    with pytest.raises(ValueError, match=message) as error:
        its_sizes = {field: changes[field] for field in PredictorSizes._fields if field in changes}
        others = {field: value for field, value in changes.items() if field not in its_sizes}
        make_predictor(name, sizes()._replace(**its_sizes), PredictorInputs(**others))
    assert "\n" not in str(error.value)


def test_the_config_names_the_predictors():
    assert tuple(PREDICTORS) == get_args(PredictorName)


def described(tree: object) -> object:
    return jax.tree.structure(tree), [
        (leaf.shape, leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(tree)
    ]


@partial(jax.jit, donate_argnums=0)
def scanned(predictor: Predictor, seen: StepView, layers: LayerView) -> tuple[Predictor, Forecast, Forecast]:
    """Runs a step with its layers in a scan, as a compiled step does."""
    state, first = predictor.start(seen)

    def one(state: object, layer: tuple) -> tuple[object, Forecast]:
        return predictor.observe(state, *layer)

    state, rest = jax.lax.scan(one, state, (jnp.arange(LAYERS, dtype=jnp.int32), layers))
    return predictor.finish(state), first, rest


@pytest.mark.parametrize("name", (*PREDICTORS, "expert_map online"))
@given(st.integers(0, 2**31), st.lists(st.integers(0, 1), min_size=3, max_size=3))
@settings(max_examples=8, deadline=None)
def test_structure_stays_and_jit_says_the_same(name: str, seed: int, valid: list[int]):
    rng, table = np.random.default_rng(seed), np.tile(embeddings(), (1, 2))[:, :D]
    profile = None if "online" in name else PROFILE
    predictor = make_predictor(name.split()[0], sizes(store_size=9), PredictorInputs(profile, table))
    before = described(predictor)
    seen, layers = step_of(rng, valid), layers_of(rng, 3, LAYERS)
    args = seen.seats_B, seen.valid_B, jnp.asarray(rng.integers(0, 4, (3, LAYERS, E)), jnp.float32)
    predictor = predictor.add_prompts(*args)
    assert described(predictor) == before
    eager, forecasts = walked(predictor, seen, layers)
    assert described(eager) == before
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *layers)
    after, first, rest = scanned(jax.tree.map(jnp.copy, predictor), seen, stacked)
    assert described(after) == before == described(jax.jit(lambda p: p.add_prompts(*args))(predictor))
    found = jax.tree.map(lambda one, more: np.concatenate([one[None], more]), first, rest)
    expected = jax.tree.map(lambda *each: np.stack(each), *forecasts)
    np.testing.assert_allclose(found.p_AE, expected.p_AE, atol=1e-6)
    np.testing.assert_array_equal(found.wanted_AE, expected.wanted_AE)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), after, eager)
    assert found.p_AE.dtype == np.float32 and found.p_AE.shape == (LAYERS + 1, A, E)


@pytest.mark.parametrize("name", (*PREDICTORS, "expert_map online"))
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
def test_a_token_whose_scores_are_no_numbers_says_and_leaves_nothing(name: str, value: float):
    """The forecast of its mates is the one without it.

    A later step's is that of a predictor that never saw it.
    """
    table = np.tile(embeddings(), (1, 2))[:, :D]
    profile = None if "online" in name else PROFILE
    made = make_predictor(name.split()[0], sizes(store_size=9), PredictorInputs(profile, table))
    rng = np.random.default_rng(2)
    seen, layers = step_of(rng, [1, 1, 1]), layers_of(rng, 3, LAYERS)
    made, _ = walked(made, seen, layers)
    bad = [
        LayerView(each.scores_BE.at[0].set(value), each.ids_BK, each.next_scores_BAE.at[0].set(value))
        for each in layers
        if each.next_scores_BAE is not None
    ]
    alone = seen._replace(valid_B=jnp.asarray([False, True, True]))
    after, forecasts = walked(made, seen, bad)
    _, expected = walked(made, alone, layers)
    by_ids = name in ("token_table", "counts")  # by the token's id, or by what its request chose
    for got, want in zip(forecasts[1:], expected[1:], strict=True):
        assert np.isfinite(got.p_AE).all()
        if not by_ids:
            np.testing.assert_allclose(got.p_AE, want.p_AE, atol=1e-6)
            np.testing.assert_array_equal(got.wanted_AE, want.wanted_AE)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    overflown = seen._replace(embeddings_BD=seen.embeddings_BD.at[0].set(value))
    for state in (walked(made, overflown, bad), walked(after, overflown, bad)):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
