"""Tests LYNX's stage: properties of every batch, and that ranks with common weights agree on the experts."""

import dataclasses
from functools import lru_cache, partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from jmoe_kernels import binning
from support.models.layers import layer_on, run
from support.models.small import config, mesh_of
from support.oracles.routers import EXPERTS, GROUPED, VARIANTS, Variant
from support.oracles.routers import compiled as router

from jmoe.config.moe import MoEConfig
from jmoe.config.parts import RouterConfig
from jmoe.config.techniques import BinningConfig, CapacityConfig
from jmoe.mesh import EXPERT, TOKENS, make_mesh
from jmoe.moe.binning import bin_assignments, get_rule
from jmoe.moe.capacity import ExpertShard, limit
from jmoe.moe.decide import Decider
from jmoe.moe.routing import route
from jmoe.moe.types import Knobs, Routing, TokenFlags

ROWS, K = 12, 4
CONFIGS = {
    "affinity": BinningConfig(bin_width=0.5),
    "narrow affinity": BinningConfig(bin_width=0.05),
    "oea": BinningConfig("oea", k0=2),
    "budget": BinningConfig("budget", keep=0.4),
    "popularity": BinningConfig("popularity", keep=0.4),
    "random": BinningConfig("random", keep=0.4),
}
PAD, LOSSY, EXACT = range(3)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Tokens of one step.

    logits: logits of each token.
    kinds: what each token is.
    """

    logits: np.ndarray
    kinds: np.ndarray

    def rows(self, of: np.ndarray) -> "Batch":
        return Batch(self.logits[of], self.kinds[of])


@lru_cache
def compiled(cfg: BinningConfig, k: int):
    rule = get_rule(cfg, k)

    def stage(plain, kind_T, seed):
        flags = TokenFlags(kind_T != PAD, kind_T == EXACT)
        votes = binning.cast_votes(plain.ids_TK, plain.logits_TE, flags.valid_T, flags.lossy_T, rule)
        drawn = jax.random.uniform(jax.random.key(seed), (EXPERTS,))
        active_E = binning.choose_active(votes, rule, drawn)
        return *bin_assignments(plain, flags, rule, seed=seed), active_E

    return jax.jit(stage)


def bin_batch(cfg: BinningConfig, batch: Batch, variant: Variant = VARIANTS["mixtral"]):
    """Returns (plain routing, binned routing, moved assignments by token, active experts) as numpy arrays."""
    plain = router(variant)(jnp.asarray(batch.logits), variant.correction(), None)
    binned = compiled(cfg, variant.k)(plain, jnp.asarray(batch.kinds), jnp.int32(3))
    return jax.tree.map(np.asarray, (plain, *binned))


@st.composite
def batches(draw) -> Batch:
    """Draws logits with near and exact ties, and every mixture of padding, lossy and exact tokens."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.standard_normal((ROWS, EXPERTS)) * draw(st.sampled_from([0.0, 0.3, 1.0, 30.0]))
    if draw(st.booleans()):
        logits = np.round(logits * 4) / 4
    if draw(st.booleans()):  # tokens alike: the union is small
        logits = logits[rng.integers(0, 2, ROWS)]
    kinds = rng.choice(
        3, ROWS, p=draw(st.sampled_from([(0.3, 0.5, 0.2), (0, 1, 0), (0.9, 0.1, 0), (0.5, 0, 0.5)]))
    )
    return Batch(logits.astype(np.float32), kinds)


NO_TOKENS = Batch(np.zeros((ROWS, EXPERTS), np.float32), np.full(ROWS, PAD))
variants = st.sampled_from(list(VARIANTS.values()))


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=120, deadline=None)
@given(batch=batches(), variant=variants)
@example(batch=NO_TOKENS, variant=VARIANTS["mixtral"])
def test_what_holds_for_every_batch_and_router(name: str, batch: Batch, variant: Variant):
    k = variant.k
    plain, binned, moved_T, active_E = bin_batch(CONFIGS[name], batch, variant)
    lossy, exact = batch.kinds == LOSSY, batch.kinds == EXACT
    chosen = set(plain.ids_TK[lossy | exact].ravel())
    active = set(np.flatnonzero(active_E))
    assert active <= chosen, "nothing is read that plain top-k would not have read"
    assert len(active) >= k or not (lossy | exact).any()
    assert set(plain.ids_TK[exact].ravel()) <= active
    assert set(binned.ids_TK[lossy].ravel()) <= active
    assert all(len(set(ids)) == k for ids in binned.ids_TK) and binned.ids_TK.max() < EXPERTS

    np.testing.assert_array_equal(moved_T, (plain.ids_TK != binned.ids_TK).sum(1))
    untouched = moved_T == 0
    assert untouched[~lossy].all(), "padding and exact tokens"
    np.testing.assert_array_equal(binned.weights_TK[untouched], plain.weights_TK[untouched])
    np.testing.assert_allclose(binned.weights_TK.sum(1), plain.weights_TK.sum(1), rtol=1e-5)
    score_TK = np.take_along_axis(plain.scores_TE, binned.ids_TK, 1)[~untouched]
    total_T1 = score_TK.sum(1, keepdims=True)
    shares = np.divide(score_TK, total_T1, out=np.full_like(score_TK, 1 / k), where=total_T1 > 0)
    np.testing.assert_allclose(
        binned.weights_TK[~untouched], shares * plain.weights_TK[~untouched].sum(1, keepdims=True), rtol=1e-4
    )
    for before, after, logits in zip(
        plain.ids_TK[lossy], binned.ids_TK[lossy], plain.logits_TE[lossy], strict=True
    ):
        kept = [e for e in before if e in active]
        assert all(a == b for a, b in zip(after, before, strict=True) if b in active), (
            "kept ones stay in place"
        )
        spare = sorted(active - set(before), key=lambda e: (-logits[e], e))
        assert [a for a, b in zip(after, before, strict=True) if a != b] == spare[: k - len(kept)]
    if "affinity" in name or name == "oea":
        assert set(plain.ids_TK[lossy, 0]) <= active, "every token's best"


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=25, deadline=None)
@given(batch=batches(), variant=variants, order=st.permutations(range(ROWS)))
def test_neither_order_nor_padding_matters(name: str, batch: Batch, variant: Variant, order: list[int]):
    _, binned, _, active_E = bin_batch(CONFIGS[name], batch, variant)
    _, shuffled, _, same_E = bin_batch(CONFIGS[name], batch.rows(np.array(order)), variant)
    np.testing.assert_array_equal(active_E, same_E)
    np.testing.assert_array_equal(binned.ids_TK[order], shuffled.ids_TK)
    np.testing.assert_array_equal(binned.weights_TK[order], shuffled.weights_TK)
    other = Batch(np.where(batch.kinds[:, None] == PAD, 7.0, batch.logits).astype(np.float32), batch.kinds)
    np.testing.assert_array_equal(bin_batch(CONFIGS[name], other, variant)[3], active_E)


@settings(max_examples=40, deadline=None)
@given(batch=batches(), variant=variants)
def test_a_width_beyond_every_gap_is_plain_top_k_bit_for_bit(batch: Batch, variant: Variant):
    plain = bin_batch(CONFIGS["affinity"], batch, variant)[0]
    logit_TK = np.take_along_axis(plain.logits_TE, plain.ids_TK, 1)
    widest = float((logit_TK.max(1) - logit_TK.min(1)).max())
    wide = BinningConfig(bin_width=4.0 ** np.ceil(np.log2(widest * 1.01 + 1e-2) / 2))  # few traces
    plain, binned, moved_T, _ = bin_batch(wide, batch, variant)
    assert not moved_T.any()
    np.testing.assert_array_equal(plain.ids_TK, binned.ids_TK)
    np.testing.assert_array_equal(plain.weights_TK, binned.weights_TK)


@pytest.mark.parametrize("width", [1e-30, 2.0**-126, 2.0**127])
def test_extreme_widths_keep_every_best_choice(width: float):
    batch = Batch(np.random.default_rng(0).standard_normal((ROWS, EXPERTS), np.float32), np.full(ROWS, LOSSY))
    plain, _, moved_T, active_E = bin_batch(BinningConfig(bin_width=width), batch)
    best = set(plain.ids_TK[:, 0])
    assert best <= set(np.flatnonzero(active_E))
    if width > 1:
        assert not moved_T.any()
    else:
        assert len(best) >= K and best == set(np.flatnonzero(active_E)) and moved_T.any()


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=20, deadline=None)
@given(batch=batches(), variant=variants, at=st.integers(0, ROWS - 1))
def test_a_batch_of_one_stays_as_it_is(name: str, batch: Batch, variant: Variant, at: int):
    kinds = np.where(np.arange(ROWS) == at, LOSSY, PAD)
    _, _, moved_T, active_E = bin_batch(CONFIGS[name], Batch(batch.logits, kinds), variant)
    assert not moved_T.any() and active_E.sum() == variant.k


def test_a_smaller_width_reads_fewer_experts():
    logits = np.random.default_rng(1).standard_normal((ROWS, EXPERTS), np.float32)
    batch = Batch(logits, np.where(np.arange(ROWS) < 5, LOSSY, PAD))
    sizes = [bin_batch(BinningConfig(bin_width=w), batch)[3].sum() for w in (0.05, 0.2, 0.5, 1.0, 9.0)]
    assert sizes == sorted(sizes) and K < sizes[0] < sizes[2] < sizes[-1]


def test_a_token_of_nans_harms_no_other():
    logits = np.random.default_rng(2).standard_normal((ROWS, EXPERTS), np.float32)
    logits[4] = np.nan
    for cfg, variant in product(CONFIGS.values(), VARIANTS.values()):
        _, binned, _, _ = bin_batch(cfg, Batch(logits, np.full(ROWS, LOSSY)), variant)
        assert binned.ids_TK.min() >= 0 and binned.ids_TK.max() < EXPERTS
        assert np.isfinite(np.delete(binned.weights_TK, 4, 0)).all()


def test_a_token_leaves_its_groups_only_where_they_have_too_few_active_experts():
    """It then goes to experts that are read anyway, so that it keeps as many as the router gave it."""
    seen = set()
    for name, seed in product(GROUPED, range(8)):
        variant, logits = VARIANTS[name], np.random.default_rng(seed).standard_normal((ROWS, EXPERTS))
        batch = Batch(logits.astype(np.float32), np.full(ROWS, LOSSY))
        plain, binned, moved_T, active_E = bin_batch(CONFIGS["narrow affinity"], batch, variant)
        for t in np.flatnonzero(moved_T):
            opened = plain.logits_TE[t] > -np.inf
            outside = ~opened[binned.ids_TK[t]]
            assert outside.sum() == max(0, variant.k - (active_E & opened).sum())
            assert np.isfinite(binned.weights_TK[t]).all()
            seen.add((name, bool(outside.any())))
    assert seen >= {
        ("deepseek-v2", True),
        ("deepseek-v2", False),
        ("deepseek-v3", True),
        ("deepseek-v3", False),
    }


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shape", [(1, 4, 1), (2, 2, 1)], ids=str)
def test_ranks_that_share_weights_vote_together(shape: tuple[int, int, int], name: str):
    """Ranks of one data replica bin as one batch; another replica has weights, and a batch, of its own."""
    rng, rule = np.random.default_rng(5), get_rule(CONFIGS[name], K)
    rows = ROWS * shape[0]
    logits = rng.standard_normal((rows, EXPERTS), np.float32)
    kinds = rng.choice(3, rows, p=(0.2, 0.6, 0.2))

    def on_shard(logits_TE, kind_T) -> Routing:
        flags = TokenFlags(kind_T != PAD, kind_T == EXACT)
        plain = route(logits_TE, K, RouterConfig())
        total = partial(jax.lax.psum, axis_name=EXPERT)
        return bin_assignments(plain, flags, rule, seed=jnp.int32(3), total=total)[0]

    tokens = PartitionSpec(TOKENS)
    sharded = jax.shard_map(on_shard, mesh=mesh_of(shape), in_specs=tokens, out_specs=tokens, check_vma=False)
    got = jax.jit(sharded)(logits, kinds)
    for replica in range(shape[0]):
        mine = slice(replica * ROWS, (replica + 1) * ROWS)
        _, expected, _, _ = bin_batch(CONFIGS[name], Batch(logits[mine], kinds[mine]))
        np.testing.assert_array_equal(got.ids_TK[mine], expected.ids_TK)
        np.testing.assert_allclose(got.weights_TK[mine], expected.weights_TK, rtol=1e-6)


@pytest.mark.parametrize("policy", ["reroute", "expand"])
def test_a_capacity_after_binning_brings_no_expert_back(policy: str):
    logits = np.random.default_rng(6).standard_normal((ROWS, EXPERTS), np.float32)
    flags, cfg = TokenFlags(jnp.arange(ROWS) < 8), CapacityConfig(policy=policy)
    plain = route(jnp.asarray(logits), K, RouterConfig())
    binned, _ = bin_assignments(plain, flags, get_rule(CONFIGS["affinity"], K), seed=jnp.int32(0))
    chosen = {}
    for name, routing in (("plain", plain), ("binned", binned)):
        shard, seed = ExpertShard(0, EXPERTS // 2), jnp.int32(0)
        limited, counts = limit(routing, flags, cfg, factor=jnp.float32(1.5), shard=shard, seed=seed)
        assert (counts.rerouted_T + counts.extra_T).sum() > 0
        chosen[name] = set(np.asarray(limited.ids_TK)[:8].ravel()) - {EXPERTS}
    assert chosen["binned"] <= set(np.asarray(binned.ids_TK)[:8].ravel()) < chosen["plain"]


@lru_cache
def preferring(k: int):
    """Returns a configuration with the preference and without any binning."""
    wide = get_rule(BinningConfig(bin_width=1e9), k)
    return jax.jit(lambda plain, flags, bonus_E: bin_assignments(plain, flags, wide, seed=0, bonus_E=bonus_E))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_token_prefers_the_experts_of_its_own_rank(name: str):
    """The result equals a plain loop's; weights are the token's own scores of its new experts."""
    variant, k = VARIANTS[name], VARIANTS[name].k
    rng, bonus = np.random.default_rng(8), 0.7
    logits = rng.standard_normal((ROWS, EXPERTS), np.float32)
    flags = TokenFlags(jnp.arange(ROWS) < 10, jnp.arange(ROWS) == 4)
    plain = router(variant)(logits, variant.correction(), None)
    own_E = (np.arange(EXPERTS) >= 6) & (np.arange(EXPERTS) < 12)  # a group and half of another
    bonus_E = np.where(own_E, np.float32(bonus), np.float32(0))
    near, moved_T = preferring(k)(plain, flags, bonus_E)
    liked = np.asarray(plain.logits_TE) + bonus_E
    for token in range(ROWS):
        before, after = np.asarray(plain.ids_TK[token]), np.asarray(near.ids_TK[token])
        if token == 4 or token >= 10:
            assert after.tolist() == before.tolist()
            continue
        assert set(after) == set(np.argsort(-liked[token], kind="stable")[:k])
        assert moved_T[token] == len(set(after) - set(before))
        weights, score = np.asarray(plain.weights_TK[token]), np.asarray(plain.scores_TE[token])[after]
        if moved_T[token]:
            weights = score / score.sum() * weights.sum()
        np.testing.assert_allclose(near.weights_TK[token], weights, rtol=1e-5)
    assert moved_T.sum() > 0 or name == "deepseek-v3-no-choice"
    np.testing.assert_array_equal(near.logits_TE, plain.logits_TE)


# ---- in the layer

LAYER = config(num_experts=EXPERTS, num_experts_per_tok=K)
BINNED = MoEConfig(binning=BinningConfig(bin_width=0.2))


def through(layer, x, flags: TokenFlags, phase: str):
    graph, state = nnx.split(layer)
    knobs = Knobs({}, np.int32(3))
    out = jax.jit(lambda s, x: nnx.merge(graph, s)(x, flags, phase, knobs))(state, x)
    return out.y_TD, out.stats, out.changes


def test_the_layer_bins_decode_steps_only():
    x, valid = (
        np.random.default_rng(0).standard_normal((48, LAYER.hidden_size), np.float32),
        np.arange(48) % 8 == 0,
    )
    plain_y, plain = run(layer_on(make_mesh(), LAYER), x, valid)
    layer, flags = layer_on(make_mesh(), LAYER, BINNED), TokenFlags(jnp.asarray(valid))
    y, stats, changes = through(layer, x, flags, "prefill")
    assert changes is None and stats.counts["remapped"] == 0
    np.testing.assert_array_equal(y, plain_y)
    y, stats, changes = through(layer, x, flags, "decode")
    assert stats.counts["remapped"] == changes["remapped"].sum() > 0
    np.testing.assert_array_equal(stats.plain_counts_E, plain.counts_E)
    assert (
        stats.counts_E.sum() == plain.counts_E.sum()
        and (stats.counts_E > 0).sum() < (plain.counts_E > 0).sum()
    )
    still = np.asarray(changes["remapped"]) == 0
    np.testing.assert_allclose(np.asarray(y)[still], np.asarray(plain_y)[still], atol=1e-6)
    assert (np.abs(np.asarray(y - plain_y)).max(1) > 1e-3)[~still].mean() > 0.9


@pytest.mark.parametrize("transport", ["replicated", "ragged_all_to_all"])
def test_the_layer_on_a_mesh_equals_the_layer_on_one_device(transport: str):
    x = np.random.default_rng(1).standard_normal((32, LAYER.hidden_size), np.float32)
    flags = TokenFlags(jnp.arange(32) % 5 == 0, jnp.arange(32) % 15 == 0)
    expected, stats, _ = through(layer_on(make_mesh(), LAYER, BINNED), x, flags, "decode")
    moe = dataclasses.replace(BINNED, transport=transport)
    y, spread, changes = through(layer_on(mesh_of((1, 4, 2)), LAYER, moe), x, flags, "decode")
    np.testing.assert_allclose(y, expected, atol=1e-4)
    np.testing.assert_array_equal(stats.counts_E, spread.counts_E)
    assert spread.counts["remapped"] == stats.counts["remapped"] == changes["remapped"].sum() > 0


@pytest.mark.matrix
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 1)], ids=str)
@pytest.mark.parametrize("kernel", ["pallas_tpu", "pallas_gpu"])
def test_the_layer_with_a_fused_kernel_equals_the_portable_one(kernel: str, shape, monkeypatch):
    """One call leads from the logits to the sorted assignments, which the dispatch then uses as they are."""
    mesh, tokens = mesh_of(shape), 8
    x = np.random.default_rng(2).standard_normal((tokens, LAYER.hidden_size), np.float32)
    flags = TokenFlags(jnp.arange(tokens) != 3, jnp.arange(tokens) == 6)
    layer = layer_on(mesh, LAYER, dataclasses.replace(BINNED, kernel="xla"))
    expected, stats, changes = through(layer, x, flags, "decode")
    calls, entry = [], binning.bin_experts

    def interpreted(logits, valid, lossy, rule, choice, **options):
        calls.append(choice.implementation)
        return entry(logits, valid, lossy, rule, choice._replace(interpret=True), **options)

    monkeypatch.setattr(binning, "bin_experts", interpreted)
    kernels = dataclasses.replace(layer.kernels, platform=kernel[-3:], binning=kernel)
    layer.decider = Decider(dataclasses.replace(layer.decider.blueprint, kernels=kernels))
    y, fused, moved = through(layer, x, flags, "decode")
    assert calls == [kernel]
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_array_equal(fused.counts_E, stats.counts_E)
    np.testing.assert_array_equal(fused.plain_counts_E, stats.plain_counts_E)
    np.testing.assert_array_equal(moved["remapped"], changes["remapped"])


def test_a_local_bonus_keeps_rows_at_home():
    x = np.random.default_rng(3).standard_normal((32, LAYER.hidden_size), np.float32)
    flags, remote = TokenFlags(jnp.ones(32, bool)), {}
    for bonus in (0.0, 1.0, 50.0):
        moe = MoEConfig(binning=BinningConfig(bin_width=1e9, local_bonus=bonus))
        _, stats, changes = through(layer_on(mesh_of((1, 4, 1)), LAYER, moe), x, flags, "decode")
        remote[bonus] = int(stats.counts["remote_assignments"])
        assert (changes["remapped"].sum() > 0) == (bonus > 0)
    assert remote[0.0] > remote[1.0] > remote[50.0] == 0, "a rank has as many experts as a token takes"
    with pytest.raises(ValueError, match="local_bonus needs experts on several devices"):
        layer_on(make_mesh(), LAYER, MoEConfig(binning=BinningConfig(local_bonus=1.0)))
