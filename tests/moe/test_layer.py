"""Tests MoELayer against the dense oracle, on one device and on every mesh shape, with every transport."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from support.models.layers import layer_on, run
from support.models.small import MESHES, config, mesh_of
from support.oracles.dense_moe import moe_reference

from jmoe.config.moe import MoEConfig
from jmoe.config.parts import RouterConfig
from jmoe.mesh import make_mesh
from jmoe.moe.layer import MoELayer
from jmoe.moe.routing import plan_dispatch, route

TOKENS = 48


def oracle(layer: MoELayer, x, valid=None):
    cfg = layer.cfg
    weights = (layer.router.gate_ED, layer.experts.gate_up_E2FD, layer.experts.down_EDF)
    arrays = [np.asarray(w[...]) for w in weights]
    return moe_reference(
        x, *arrays, cfg.num_experts_per_tok, renormalize=cfg.router.norm_topk_prob, valid_T=valid
    )


def inputs(cfg, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((TOKENS, cfg.hidden_size), np.float32), rng.random(TOKENS) < 0.7


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_one_device_equals_the_oracle(k: int, renormalize: bool):
    cfg = config(num_experts_per_tok=k, router=RouterConfig(norm_topk_prob=renormalize))
    layer = layer_on(make_mesh(), cfg)
    x, valid = inputs(cfg)
    y, stats = run(layer, x, valid)
    np.testing.assert_allclose(y, oracle(layer, x, valid), atol=1e-4)
    assert stats.counts_E.sum() == valid.sum() * k and not any(stats.counts.values())


def cells() -> list:
    """Returns every mesh with every transport, kernels by turns: each mesh and each transport meets both."""
    found = [(mesh, "ragged_all_to_all", None) for mesh in MESHES]
    for (i, mesh), (j, transport) in itertools.product(
        enumerate(MESHES), enumerate(("replicated", "all_to_all"))
    ):
        found.append((mesh, transport, "xla" if (i + j) % 2 else None))
    return found


@pytest.mark.parametrize(("shape", "transport", "kernel"), cells(), ids=str)
def test_every_mesh_equals_the_oracle(shape, transport: str, kernel: str | None):
    cfg = config(num_experts=16, num_experts_per_tok=4)
    layer = layer_on(mesh_of(shape), cfg, MoEConfig(transport=transport, kernel=kernel))
    x, valid = inputs(cfg)
    y, stats = run(layer, x, valid)
    np.testing.assert_allclose(y, oracle(layer, x, valid), atol=1e-4)
    single = run(layer_on(make_mesh(), cfg), x, valid)[1]
    np.testing.assert_array_equal(stats.counts_E, single.counts_E)
    np.testing.assert_allclose(stats.mean_score_E, single.mean_score_E, atol=1e-6)
    ranks, traffic, remote = shape[1], stats.traffic, stats.counts["remote_assignments"]
    assert (remote > 0) == (traffic.useful_rows > 0) == (traffic.sent_rows > 0) == (ranks > 1)
    assert traffic.useful_rows <= remote <= traffic.useful_rows * 4


@pytest.mark.parametrize("transport", ["replicated", "all_to_all", "ragged_all_to_all"])
def test_skewed_routing_loses_nothing(transport: str):
    """Every token of every rank goes to the experts of one rank: the worst case of the padded buffer."""
    cfg = config(num_experts=16, num_experts_per_tok=2)
    layer = layer_on(mesh_of((1, 8, 1)), cfg, MoEConfig(transport=transport))
    gate = np.zeros((16, cfg.hidden_size), np.float32)
    gate[6:8] = 1.0 + np.arange(2)[:, None]
    layer.router.gate_ED.set_value(jnp.asarray(gate))
    x, valid = np.abs(inputs(cfg)[0]), np.ones(TOKENS, bool)
    y, stats = run(layer, x, valid)
    np.testing.assert_allclose(y, oracle(layer, x), atol=1e-4)
    assert stats.counts_E[6] == stats.counts_E[7] == TOKENS
    per_rank = TOKENS // 8
    remote = stats.counts["remote_assignments"]
    assert remote == 2 * (TOKENS - per_rank), "all but the owning rank's own tokens travel"
    everywhere = 7 * TOKENS
    sent = {"replicated": everywhere, "all_to_all": 2 * everywhere, "ragged_all_to_all": remote}
    assert stats.traffic.useful_rows == TOKENS - per_rank and stats.traffic.sent_rows == sent[transport]


def test_padding_changes_nothing():
    cfg = config()
    layer = layer_on(make_mesh(), cfg)
    x, valid = inputs(cfg)
    padded, _ = run(layer, np.where(valid[:, None], x, 1e9).astype(np.float32), valid)
    compact, _ = run(layer, x[valid], np.ones(valid.sum(), bool))
    np.testing.assert_allclose(padded[valid], compact, atol=1e-5)
    assert not np.any(np.asarray(padded)[~valid])


def test_sizes_that_do_not_divide_are_refused_with_the_divisors():
    with pytest.raises(
        ValueError, match=r"expert parallel size 8 does not divide experts 12; .*\[1, 2, 3, 4, 6, 12\]"
    ):
        layer_on(mesh_of((1, 8, 1)), config(num_experts=12))
    with pytest.raises(ValueError, match="tensor parallel size 8 does not divide expert inner size 12"):
        layer_on(mesh_of((1, 1, 8)), config(moe_intermediate_size=12))
    with pytest.raises(ValueError, match="needs 16 devices, 8 present"):
        make_mesh(2, 8, 1)


def test_training_capacity_drops_are_counted():
    cfg = config()
    layer = layer_on(make_mesh(), cfg, MoEConfig(kernel="batched", train_capacity_factor=1.0))
    x = np.tile(inputs(cfg)[0][:1], (512, 1))  # one token repeated: its two experts get all rows
    _, stats = run(layer, x, np.ones(512, bool))
    assert stats.counts["dropped"] == 2 * (512 - 128)


def test_plan_puts_foreign_and_padding_assignments_last():
    ids = np.array([[0, 5], [4, 1], [5, 4]], np.int32)
    plan = plan_dispatch(jnp.asarray(ids), jnp.array([True, True, False]), 4, 4)
    assert plan.group_sizes_L.tolist() == [1, 1, 0, 0]
    assert plan.order_N[:2].tolist() == [2, 1]


def test_ties_go_to_the_lower_expert():
    routing = route(jnp.zeros((2, 6)), 3, RouterConfig())
    assert routing.ids_TK.tolist() == [[0, 1, 2]] * 2
    np.testing.assert_allclose(routing.weights_TK, 1 / 3, rtol=1e-6)
