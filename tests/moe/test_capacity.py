"""Tests the capacity stage against its rule in plain Python, and its promises."""

import math
from fractions import Fraction
from functools import cache, partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from support.models.small import mesh_of
from support.oracles import capacity as capacity_oracle
from support.oracles.capacity import Shard
from support.oracles.routers import EXPERTS, VARIANTS
from support.oracles.routers import compiled as router

from jmoe.config.techniques import CapacityConfig
from jmoe.mesh import EXPERT, TOKENS
from jmoe.moe.capacity import CapacityCounts, ExpertShard, capacity, limit
from jmoe.moe.types import Routing, TokenFlags

ROWS, CHOICES, HELD = 24, 4, 4
METRICS = ("score", "order", "reverse_order", "random")
CONFIGS = [
    *(CapacityConfig(policy=p, metric=m, scope=s)
      for p, m, s in product(("drop", "reroute", "expand"), METRICS, ("expert", "device"))),
    *(CapacityConfig(policy=p, renormalize=True) for p in ("drop", "reroute", "expand", "expert_drop")),
    CapacityConfig(policy="reroute", rounds=16),
    CapacityConfig(policy="reroute", rounds=1),
    CapacityConfig(policy="expert_drop"),
]  # fmt: skip
RANKED = [cfg for cfg in CONFIGS if cfg.policy != "expert_drop"]
KINDS = ("plain", "renormalized", "skewed", "ties", "all to one", "same for all", "absent", "zeros")
ROUTERS = tuple(name for name, v in VARIANTS.items() if v.k == CHOICES)  # the same programs run with these


def routed(name: str, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Returns (ids, weights, scores) of the router of that name; some experts are liked by most tokens."""
    logits = (rng.standard_normal((ROWS, EXPERTS)) + rng.standard_normal(EXPERTS)).astype(np.float32)
    out = router(VARIANTS[name])(logits, VARIANTS[name].correction(), None)
    return np.asarray(out.ids_TK), np.asarray(out.weights_TK), np.asarray(out.scores_TE)


def shard(kind: str, seed: int = 0, valid: float = 0.8, exact: float = 0.2) -> Shard:
    """Returns a routing of the named kind, or by the router of that name.

    Scores of a kind are such that float32 sums of them are exact, in any order.
    """
    rng = np.random.default_rng(seed)
    if kind in VARIANTS:
        return _flagged(*routed(kind, rng), rng, valid, exact)
    scores = np.stack([rng.permutation(2048 - 16)[:EXPERTS] + 16 for _ in range(ROWS)])
    if kind == "skewed":
        scores[:, 3:6] += 512
    elif kind == "ties":
        scores = rng.integers(1, 4, scores.shape) * 64
    elif kind == "all to one":
        scores[:, 2:6] += 4096
    elif kind == "same for all":
        scores[:] = 64
    elif kind == "zeros":
        scores[:, 5:] = 0
    scores = (scores / 2**16).astype(np.float32)
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :CHOICES].astype(np.int32)
    weights = np.take_along_axis(scores, ids, axis=1)
    if kind == "absent":
        gone = rng.random(ids.shape) < 0.4
        ids, weights = np.where(gone, EXPERTS, ids).astype(np.int32), np.where(gone, 0, weights)
    if kind == "renormalized":
        weights = weights / weights.sum(1, keepdims=True, dtype=np.float32)
    return _flagged(ids, weights, scores, rng, valid, exact)


def _flagged(ids, weights, scores, rng: np.random.Generator, valid: float, exact: float) -> Shard:
    flags = rng.random(ROWS) < valid, rng.random(ROWS) < exact
    local = (int(rng.integers(EXPERTS // HELD)) * HELD, HELD)
    return Shard(ids, weights, scores, *flags, rng.integers(0, 2, ROWS).astype(np.float32), local)


@cache
def compiled(cfg: CapacityConfig):
    """Returns the stage in jit, with everything that varies traced.

    The expert offset is traced too, as ``axis_index`` makes it.
    """

    def run(routing, tokens, factor, first, seed):
        return limit(routing, tokens, cfg, factor=factor, shard=ExpertShard(first, HELD), seed=seed)

    return jax.jit(run)


def run(case: Shard, cfg: CapacityConfig, factor: float = 1.0, seed: int = 7):
    routing = Routing(*map(jnp.asarray, (case.ids, case.weights, case.scores, np.log(case.scores))))
    priority = None if case.priority is None else jnp.asarray(case.priority)
    tokens = TokenFlags(jnp.asarray(case.valid), jnp.asarray(case.exact), priority)
    out, counts = compiled(cfg)(
        routing, tokens, jnp.float32(factor), jnp.int32(case.local[0]), jnp.int32(seed)
    )
    return np.asarray(out.ids_TK), np.asarray(out.weights_TK), jax.device_get(counts)


def check(case: Shard, cfg: CapacityConfig, factor: float) -> None:
    columns = case.ids.shape[1] + (HELD if cfg.policy == "expand" else 0)
    draws = np.asarray(jax.random.uniform(jax.random.key(7), (len(case.ids), columns)))
    ids, weights, counts = capacity_oracle.limit(case, cfg, factor, draws)
    got_ids, got_weights, got_counts = run(case, cfg, factor)
    np.testing.assert_array_equal(got_ids, ids)
    np.testing.assert_allclose(got_weights, weights, rtol=2e-6)
    for name, expected in counts.items():
        np.testing.assert_array_equal(getattr(got_counts, name), expected, err_msg=name)


@pytest.mark.parametrize(
    "cfg", CONFIGS, ids=lambda c: f"{c.policy}-{c.metric}-{c.scope}-{c.rounds}-{c.renormalize}"
)
def test_equals_the_restatement(cfg: CapacityConfig):
    for kind, factor in product(KINDS, (0.3, 1.0, 1.5)):
        check(shard(kind, seed=len(kind)), cfg, factor)
    everyone = np.ones(ROWS, bool)
    for valid, exact in ((~everyone, ~everyone), (everyone, everyone), (np.arange(ROWS) == 5, ~everyone)):
        case = shard("skewed")
        case.valid, case.exact = valid, exact
        check(case, cfg, 1.0)


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_restatement_by_every_router(name: str):
    """Weights may be no scores, or sum to another number than 1, and a token may have one choice or two."""
    for seed in range(3):
        check(shard(name, seed), CapacityConfig(policy="reroute", renormalize=True), 1.0)
        check(shard(name, seed), CapacityConfig(policy="reroute"), 0.6)
        check(shard(name, seed), CapacityConfig(policy="expand"), 0.6)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_choice_in_place_of_another_weighs_what_the_router_would_have_given_it(name: str):
    """The weights are equal up to the router's normalisation, which is over the experts that it chose."""
    variant, case = VARIANTS[name], shard(name, 3, valid=1, exact=0)
    before = case.weights / np.take_along_axis(case.scores, case.ids, 1)
    for policy in ("reroute", "expand"):
        ids, weights, counts = run(case, CapacityConfig(policy=policy), 0.6)
        own = np.zeros(case.scores.shape, bool)
        np.put_along_axis(own, case.ids, True, 1)
        for t, j in zip(*np.nonzero(ids < EXPERTS), strict=True):
            if own[t, ids[t, j]]:
                assert weights[t, j] in case.weights[t]
            elif variant.router.scoring_func != "sparsemixer":  # all choices by one factor
                np.testing.assert_allclose(weights[t, j], case.scores[t, ids[t, j]] * before[t, 0], rtol=1e-4)
            else:
                assert 0 < weights[t, j] < case.weights[t].sum()
        assert (counts.rerouted_T + counts.extra_T).sum() > 0


drawn = {
    "kind": st.sampled_from(KINDS + ROUTERS),
    "seed": st.integers(0, 2**31 - 1),
    "factor": st.floats(0.01, 5),
}


@settings(max_examples=150, deadline=None)
@given(cfg=st.sampled_from(CONFIGS), **drawn)
def test_load_stays_within_the_limit_and_every_choice_is_accounted_for(cfg, kind, seed, factor):
    case = shard(kind, seed)
    ids, weights, counts = run(case, cfg, factor)
    capped, present = case.valid & ~case.exact, case.ids < EXPERTS
    np.testing.assert_array_equal(
        counts.kept_T + counts.rerouted_T + counts.dropped_T, np.where(capped, present.sum(1), 0)
    )
    np.testing.assert_array_equal(counts.exact_T, np.where(case.valid & case.exact, present.sum(1), 0))
    placed = (ids < EXPERTS) & capped[:, None]
    np.testing.assert_array_equal(placed.sum(1), counts.kept_T + counts.rerouted_T + counts.extra_T)
    assert not weights[ids == EXPERTS].any() and (weights[placed] > 0).all()
    assert all(len(set(row[row < EXPERTS])) == (row < EXPERTS).sum() for row in ids), "an expert twice"
    kept = (ids[:, :CHOICES] == case.ids) & present & capped[:, None]
    np.testing.assert_array_equal(kept.sum(1), counts.kept_T)
    assert cfg.policy == "reroute" or not counts.rerouted_T.any()
    assert cfg.policy == "expand" or not counts.extra_T.any()
    if cfg.policy != "expert_drop":
        width = HELD if cfg.scope == "device" else 1
        load = np.bincount(ids[placed] // width, minlength=EXPERTS // width)
        candidates = np.bincount(case.ids[present & capped[:, None]] // width, minlength=EXPERTS // width)
        places = int(capacity(jnp.float32(factor), jnp.int32(case.valid.sum()), CHOICES, EXPERTS)) * width
        assert (load <= places).all()
        assert (load >= np.minimum(candidates, places)).all(), "a place stayed empty"


@settings(max_examples=40, deadline=None)
@given(cfg=st.sampled_from([c for c in RANKED if c.policy != "expand"]), more=st.floats(0, 50), **drawn)
def test_a_limit_that_nothing_reaches_changes_no_bit(cfg, kind, seed, factor, more):
    case = shard(kind, seed)
    ids, weights, counts = run(case, cfg, EXPERTS / CHOICES + more)
    assert ids.tobytes() == case.ids.tobytes() and weights.tobytes() == case.weights.tobytes()
    assert not counts.dropped_T.any()


@settings(max_examples=40, deadline=None)
@given(cfg=st.sampled_from([c for c in RANKED if c.metric == "score"]), **drawn)
def test_permuting_the_tokens_permutes_the_result(cfg, kind, seed, factor):
    case = shard("plain", seed, exact=0.1)
    unique = np.random.default_rng(seed).permutation(case.scores.size).reshape(case.scores.shape) + 1
    case.scores = (unique / 2**16).astype(np.float32)
    case.ids = np.argsort(-case.scores, axis=1)[:, :CHOICES].astype(np.int32)
    case.weights = np.take_along_axis(case.scores, case.ids, axis=1)
    order = np.random.default_rng(seed + 1).permutation(ROWS)
    ids, weights, counts = run(case, cfg, factor)
    moved_ids, moved_weights, moved_counts = run(case.rows(order), cfg, factor)
    np.testing.assert_array_equal(moved_ids, ids[order])
    np.testing.assert_array_equal(moved_weights, weights[order])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[order]), moved_counts, counts)


@pytest.mark.parametrize("cfg", CONFIGS[:24:3], ids=lambda c: f"{c.policy}-{c.metric}-{c.scope}")
def test_padding_changes_nothing(cfg: CapacityConfig):
    case = shard("ties", 3)
    case.valid = np.random.default_rng(1).permutation(ROWS) < 16
    padded, compact = run(case, cfg, 0.8), run(case.rows(case.valid), cfg, 0.8)
    np.testing.assert_array_equal(padded[0][case.valid], compact[0])
    np.testing.assert_array_equal(padded[1][case.valid], compact[1])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[case.valid], b), padded[2], compact[2])
    assert not any(leaf[~case.valid].any() for leaf in jax.tree.leaves(padded[2]))


@settings(max_examples=40, deadline=None)
@given(cfg=st.sampled_from(CONFIGS), **drawn)
def test_exact_tokens_pass_unchanged_and_touch_nobody(cfg, kind, seed, factor):
    case, other = shard(kind, seed, exact=0.4), shard("skewed", seed + 1)
    swapped = case.rows(np.arange(ROWS))
    for name in ("ids", "weights", "scores"):
        getattr(swapped, name)[case.exact] = getattr(other, name)[case.exact]
    ids, weights, _ = run(case, cfg, factor)
    exact = case.exact
    assert ids[exact, :CHOICES].tobytes() == case.ids[exact].tobytes()
    assert weights[exact, :CHOICES].tobytes() == case.weights[exact].tobytes()
    assert (ids[exact, CHOICES:] == EXPERTS).all()
    swapped_ids, swapped_weights, _ = run(swapped, cfg, factor)
    np.testing.assert_array_equal(swapped_ids[~exact], ids[~exact])
    np.testing.assert_array_equal(swapped_weights[~exact], weights[~exact])


def test_priority_comes_before_the_metric():
    case = shard("all to one", valid=1, exact=0)
    case.priority = (np.arange(ROWS) >= 18).astype(np.float32)
    for cfg in (CapacityConfig(), CapacityConfig(metric="order"), CapacityConfig(metric="random")):
        _, _, counts = run(case, cfg)
        assert counts.kept_T.tolist() == [0] * 18 + [CHOICES] * 6, "C = 24 * 4 / 16 = 6"
    case.priority = None
    _, _, counts = run(case, CapacityConfig(metric="order"))
    assert counts.kept_T.tolist() == [CHOICES] * 6 + [0] * 18


def test_reroute_fills_other_experts_where_drop_loses():
    case = shard("all to one", valid=1, exact=0)
    lost = {p: run(case, CapacityConfig(policy=p))[2].dropped_T.sum() for p in ("drop", "reroute", "expand")}
    assert lost["drop"] == 4 * (24 - 6) and lost["reroute"] < lost["drop"] / 3
    full = run(case, CapacityConfig(policy="reroute", rounds=16))
    assert full[2].dropped_T.sum() == 0 and (np.bincount(full[0].ravel()) == 6).all()


def test_capacity_is_that_of_exact_arithmetic():
    tokens = np.arange(1, 4097)
    places = jax.jit(jax.vmap(capacity, (None, 0, None, None)), static_argnums=(2, 3))
    for k, experts in ((2, 8), (8, 64), (4, 60), (6, 160), (8, 128), (3, 7), (1, 256)):
        ratios = [Fraction(experts, k), *(Fraction(p, 20) for p in (4, 20, 25, 30, 40, 22))]
        for factor in ratios:
            got = places(jnp.float32(float(factor)), jnp.asarray(tokens, jnp.int32), k, experts)
            np.testing.assert_array_equal(
                got,
                [capacity_oracle.places(factor, t, k, experts) for t in tokens.tolist()],
                err_msg=str(factor),
            )
    assert places(jnp.float32(1e30), jnp.array([0, 5]), 2, 8).tolist() == [0, 5]


def test_a_new_factor_does_not_recompile():
    traces = 0

    def run_once(routing, tokens, factor, seed):
        nonlocal traces
        traces += 1
        whole = ExpertShard(0, EXPERTS)
        return limit(routing, tokens, CapacityConfig(), factor=factor, shard=whole, seed=seed)[1]

    case, jitted = shard("skewed", valid=1, exact=0), jax.jit(run_once)
    routing = Routing(*map(jnp.asarray, (case.ids, case.weights, case.scores, np.log(case.scores))))
    dropped = []
    for factor, absent in ((1.0, 0), (1.5, 0), (math.pi, 0), (1.0, 12)):
        tokens = TokenFlags(jnp.arange(ROWS) >= absent, jnp.zeros(ROWS, bool))
        dropped.append(int(jitted(routing, tokens, jnp.float32(factor), jnp.int32(0)).dropped_T.sum()))
    assert traces == 1 and dropped[0] > dropped[1] > dropped[2]


@pytest.mark.parametrize("cfg", [CapacityConfig(policy="expand"), CONFIGS[-1]], ids=lambda c: c.policy)
def test_every_shard_of_a_mesh_is_on_its_own(cfg: CapacityConfig):
    """Only "expert_drop" needs the loads of other shards."""
    mesh = mesh_of((2, 4, 1))
    cases = [shard("skewed", seed) for seed in range(8)]
    for i, case in enumerate(cases):
        case.local, case.priority = ((i % 4) * HELD, HELD), None
    names = ("ids", "weights", "scores", "valid", "exact")
    ids, weights, scores, valid, exact = (
        np.concatenate([getattr(case, name) for case in cases]) for name in names
    )

    def on_shard(ids, weights, scores, valid, exact):
        first, total = jax.lax.axis_index(EXPERT) * HELD, partial(jax.lax.psum, axis_name=TOKENS)
        out, counts = limit(
            Routing(ids, weights, scores, jnp.log(scores)), TokenFlags(valid, exact), cfg,
            factor=jnp.float32(1), shard=ExpertShard(first, HELD, total), seed=jnp.int32(7),
        )  # fmt: skip
        return out.ids_TK, counts

    tokens = PartitionSpec(TOKENS)
    sharded = jax.shard_map(on_shard, mesh=mesh, in_specs=tokens, out_specs=tokens, check_vma=False)
    got, counts = jax.jit(sharded)(ids, weights, scores, valid, exact)
    assert isinstance(counts, CapacityCounts)
    if cfg.policy == "expand":
        expected = np.concatenate([run(case, cfg)[0] for case in cases])
    else:
        joined = Shard(ids, weights, scores, valid, exact, None, (0, HELD))
        expected, _, _ = capacity_oracle.limit(joined, cfg, 1.0, np.zeros((192, CHOICES)))
    np.testing.assert_array_equal(got, expected)
