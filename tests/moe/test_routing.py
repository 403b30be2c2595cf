"""Tests every router against its definition, and the scores and numbering that the techniques need."""

import jax.numpy as jnp
import numpy as np
import pytest
from support.oracles.routers import EXPERTS, GROUPED, VARIANTS, Variant, choose, compiled

from jmoe.moe.routing import plan_dispatch, regrouped
from jmoe.moe.types import Routing

ROWS = 24


def routed(variant: Variant, logits: np.ndarray, correction=None, expert_E=None) -> Routing:
    out = compiled(variant)(jnp.asarray(logits, jnp.float32), correction, expert_E)
    return Routing(*(np.asarray(a) for a in (out.ids_TK, out.weights_TK, out.scores_TE, out.logits_TE)))


def normal(scale: float = 1.0, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((ROWS, EXPERTS)) * scale).astype(np.float32)


def check(variant: Variant, logits: np.ndarray, correction: np.ndarray | None) -> None:
    got = routed(variant, logits, correction)
    assert got.ids_TK.dtype == np.int32 and got.weights_TK.dtype == got.scores_TE.dtype == np.float32
    for t, row in enumerate(logits):
        ids, weights, opened = choose(variant, row, correction)
        assert got.ids_TK[t].tolist() == ids
        np.testing.assert_allclose(got.weights_TK[t], weights, rtol=2e-5, atol=1e-30)
        assert np.flatnonzero(~np.isneginf(got.logits_TE[t])).tolist() == opened
        assert set(np.argsort(-got.logits_TE[t], kind="stable")[: variant.k]) == set(ids)
    assert not np.isnan(got.logits_TE).any() and (got.scores_TE >= 0).all()
    np.testing.assert_allclose(got.scores_TE.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_definition(name: str):
    variant = VARIANTS[name]
    for seed, scale in enumerate((0.1, 1.0, 4.0, 12.0)):
        check(variant, normal(scale, seed), variant.correction(seed))


@pytest.mark.parametrize("name", VARIANTS)
def test_all_logits_of_one_sign(name: str):
    """The sparse mixer's distances are relative, and sigmoids saturate on one side."""
    variant = VARIANTS[name]
    for sign in (1, -1):
        check(variant, sign * (np.abs(normal()) + 3), variant.correction())


def test_a_corrections_own_level_says_nothing():
    """Choices and preferences do not depend on it, not even below 0."""
    for variant in (VARIANTS[name] for name in ("deepseek-v3", "glm")):
        correction = variant.correction()
        at_zero = routed(variant, normal(), correction)
        for level in (-3.0, 8.0):
            check(variant, normal(), correction + np.float32(level))
            moved = routed(variant, normal(), correction + np.float32(level))
            np.testing.assert_array_equal(moved.ids_TK, at_zero.ids_TK)
            chosen = np.take_along_axis(moved.logits_TE, moved.ids_TK, 1)
            expected = np.take_along_axis(at_zero.logits_TE, at_zero.ids_TK, 1)
            np.testing.assert_allclose(chosen, expected, atol=1e-4)


def test_without_a_correction_preferences_are_log_scores():
    for name, variant in VARIANTS.items():
        if variant.router.scoring_func == "sparsemixer":
            continue
        zero = np.zeros(EXPERTS, np.float32) if variant.router.correction_bias else None
        got = routed(variant, normal(), zero)
        gap = np.log(got.scores_TE) - got.logits_TE
        known = np.isfinite(gap)
        spread = np.where(known, gap, -np.inf).max(1) - np.where(known, gap, np.inf).min(1)
        np.testing.assert_allclose(spread, 0, atol=1e-4, err_msg=name)


def test_saturated_sigmoids_are_ordered_as_their_logits():
    logits = np.random.default_rng(1).permuted(np.tile(np.linspace(20, 80, EXPERTS), (ROWS, 1)), axis=1)
    got = routed(VARIANTS["llama4"], logits)
    assert (got.ids_TK[:, 0] == logits.argmax(1)).all() and (got.weights_TK == 1).all()
    order = np.argsort(-got.logits_TE, axis=1, kind="stable")
    np.testing.assert_array_equal(order, np.argsort(-logits, axis=1))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("scale", [300.0, 1e6, 1e30])
def test_no_logit_is_too_large(name: str, scale: float):
    variant = VARIANTS[name]
    got = routed(variant, normal(scale), variant.correction())
    assert np.isfinite(got.weights_TK).all() and np.isfinite(got.scores_TE).all()
    assert not np.isnan(got.logits_TE).any()
    assert all(len(set(ids)) == variant.k for ids in got.ids_TK)
    if variant.router.scoring_func != "sigmoid":  # the logarithms of sigmoids may all have become 0
        assert (got.ids_TK[:, 0] == normal(scale).argmax(1)).all()


@pytest.mark.parametrize("name", VARIANTS)
def test_ties_go_to_the_lower_group_and_expert(name: str):
    variant = VARIANTS[name]
    for level in (-5.0, 0.0, 5.0):
        zero = np.zeros(EXPERTS, np.float32) if variant.router.correction_bias else None
        got = routed(variant, np.full((2, EXPERTS), level), zero)
        assert got.ids_TK.tolist() == [list(range(variant.k))] * 2
        ids, weights, _ = choose(variant, np.full(EXPERTS, level), zero)
        assert ids == list(range(variant.k))
        np.testing.assert_allclose(got.weights_TK, [weights] * 2, rtol=1e-5)


def test_a_token_may_get_all_experts_of_its_groups():
    variant = VARIANTS["deepseek-v3-no-choice"]
    got = routed(variant, normal(), variant.correction())
    opened = [np.flatnonzero(row > -np.inf).tolist() for row in got.logits_TE]
    assert [sorted(ids) for ids in got.ids_TK.tolist()] == opened
    assert len({tuple(ids) for ids in opened}) > 4


@pytest.mark.parametrize("name", VARIANTS)
def test_a_token_of_nans_harms_no_other(name: str):
    variant, logits = VARIANTS[name], normal()
    clean = routed(variant, logits, variant.correction())
    for at in (slice(None), 3):  # all of its logits, or one
        broken = logits.copy()
        broken[5, at] = np.nan
        got = routed(variant, broken, variant.correction())
        others = np.arange(ROWS) != 5
        for field in ("ids_TK", "weights_TK", "scores_TE", "logits_TE"):
            np.testing.assert_array_equal(getattr(got, field)[others], getattr(clean, field)[others])
        assert len(set(got.ids_TK[5])) == variant.k and (got.ids_TK[5] >= 0).all()
        assert (got.ids_TK[5] < EXPERTS).all()


@pytest.mark.parametrize("name", VARIANTS)
def test_renumbered_experts_are_chosen_as_before(name: str):
    """Rows of the gate and the correction are in another order; groups are still those of the old numbers."""
    variant, correction = VARIANTS[name], VARIANTS[name].correction()
    plain = routed(variant, normal(), correction)
    for seed in range(3):
        row_P = np.random.default_rng(seed).permutation(EXPERTS).astype(np.int32)
        expert_E = jnp.asarray(row_P) if variant.router.n_group > 1 else None
        there = None if correction is None else correction[row_P]
        moved = routed(variant, normal()[:, row_P], there, expert_E)
        np.testing.assert_array_equal(row_P[moved.ids_TK], plain.ids_TK)
        np.testing.assert_allclose(moved.weights_TK, plain.weights_TK, rtol=1e-5)
        np.testing.assert_allclose(moved.scores_TE, plain.scores_TE[:, row_P], rtol=1e-5)
        np.testing.assert_allclose(moved.logits_TE, plain.logits_TE[:, row_P], rtol=1e-5, atol=1e-6)
    if name in GROUPED:
        forgotten = routed(variant, normal()[:, row_P], there)
        assert (row_P[forgotten.ids_TK] != plain.ids_TK).any(), "or the groups are too weak to tell"


def test_a_plan_with_its_groups_elsewhere_is_the_plan_of_the_places():
    """Rows of groups that have no place come after all others, each once."""
    rng, experts, places = np.random.default_rng(4), 6, 5
    for _ in range(20):
        ids_TK = rng.integers(0, experts, (7, 2)).astype(np.int32)
        valid_T = rng.random(7) < 0.8
        place_L = np.full(experts, places, np.int32)
        some = rng.permutation(experts)[: rng.integers(0, places + 1)]
        place_L[some] = rng.permutation(places)[: len(some)]
        got = regrouped(plan_dispatch(ids_TK, valid_T, 0, experts), jnp.asarray(place_L), places)
        want = plan_dispatch(place_L[ids_TK], valid_T, 0, places)
        np.testing.assert_array_equal(got.group_sizes_L, want.group_sizes_L)
        rows = int(want.group_sizes_L.sum())
        np.testing.assert_array_equal(got.order_N[:rows], want.order_N[:rows])
        assert sorted(got.order_N.tolist()) == list(range(ids_TK.size))
