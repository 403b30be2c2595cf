"""Tests a MoE layer with every router against a dense loop: renumbered, by every transport, offloaded."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jmoe_kernels.grouped_mlp import ExpertWeights
from support.models.layers import layer_on
from support.models.small import config, mesh_of
from support.oracles.routers import EXPERTS, VARIANTS, choose
from support.oracles.routers import compiled as router

from jmoe.checkpoint.experts.renumber import EXPERTS as STACKS
from jmoe.checkpoint.experts.renumber import permute_gate
from jmoe.config.moe import MoEConfig
from jmoe.config.techniques import OffloadConfig, Phase
from jmoe.mesh import make_mesh
from jmoe.moe.experts import ExpertMath, HostExperts
from jmoe.moe.layer import MoELayer
from jmoe.moe.transport import local
from jmoe.moe.types import TokenFlags
from jmoe.offload.cache import ExpertCache, Visit
from jmoe.offload.copies import copy_in
from jmoe.offload.policy import lru
from jmoe.offload.predictors.none import NoPredictor
from jmoe.offload.slot_table import CacheSettings, fill, new_table
from jmoe.offload.types import StepView
from jmoe.param import ParamMaker
from jmoe.placement.placement import Placement

ROWS, SLOTS = 16, 6
VALID = np.arange(ROWS) % 5 != 2
TRANSPORTS = ("replicated", "all_to_all", "ragged_all_to_all")


def layer_of(name: str, mesh=None, moe: MoEConfig = MoEConfig(), dtype: str = "float32") -> MoELayer:
    """Returns a layer with the same weights for every mesh and ``moe``."""
    variant = VARIANTS[name]
    cfg = config(
        num_experts=EXPERTS,
        num_experts_per_tok=variant.k,
        router=variant.router,
        dtype=dtype,
        **variant.layer,
    )
    layer = layer_on(make_mesh() if mesh is None else mesh, cfg, moe)
    if variant.router.correction_bias:
        layer.router.correction_E.set_value(jnp.asarray(variant.correction()))
    return layer


def given(layer: MoELayer) -> np.ndarray:
    return np.random.default_rng(4).standard_normal((ROWS, layer.cfg.hidden_size), np.float32)


def numbers(param: nnx.Param | None) -> np.ndarray | None:
    return None if param is None else np.asarray(param[...], np.float64)


def through_expert(layer: MoELayer, e: int, x_D: np.ndarray) -> np.ndarray:
    own = layer.experts
    gate, up = numbers(own.gate_up_E2FD)[e] @ x_D
    if own.gate_up_bias_E2F is not None:
        gate, up = np.stack([gate, up]) + numbers(own.gate_up_bias_E2F)[e]
    if layer.cfg.hidden_act == "swiglu_oai":
        gate, up = np.minimum(gate, 7), np.clip(up, -7, 7) + 1
        h_F = gate / (1 + np.exp(-1.702 * gate)) * up
    else:
        h_F = gate / (1 + np.exp(-gate)) * up
    y_D = numbers(own.down_EDF)[e] @ h_F
    return y_D if own.down_bias_ED is None else y_D + numbers(own.down_bias_ED)[e]


def logits(layer: MoELayer) -> np.ndarray:
    logits_TE = given(layer).astype(np.float64) @ numbers(layer.router.gate_ED).T
    return logits_TE if layer.router.bias_E is None else logits_TE + numbers(layer.router.bias_E)


@lru_cache
def dense(name: str) -> np.ndarray:
    """Returns what the layer must give, token by token."""
    layer, variant = layer_of(name), VARIANTS[name]
    x_TD, logits_TE = given(layer).astype(np.float64), logits(layer)
    y_TD = np.zeros(x_TD.shape)
    for t in np.flatnonzero(VALID):
        ids, weights, _ = choose(variant, logits_TE[t], variant.correction())
        for e, weight in zip(ids, weights, strict=True):
            if variant.router.weigh_input:
                y_TD[t] += through_expert(layer, e, x_TD[t] * weight)
            else:
                y_TD[t] += weight * through_expert(layer, e, x_TD[t])
    return y_TD


def program(layer: MoELayer):
    """Returns jitted (state, x) -> MoEOutput, and the state."""
    graph, state = nnx.split(layer)
    return jax.jit(lambda s, x: nnx.merge(graph, s)(x, TokenFlags(VALID))), state


def renumbered(state: nnx.State, placement: Placement) -> nnx.State:
    """Returns every parameter in a placement's order."""
    flat = nnx.to_flat_state(state)
    moved = []
    for path, param in flat:
        name, array = "layers.0.moe." + ".".join(path), np.array(param.get_value())
        permute_gate(name, array, placement, [0])
        if name.removeprefix("layers.0.") in STACKS:
            array = array[placement.experts_LP[0]]
        moved.append((path, param.replace(jnp.asarray(array))))
    return nnx.from_flat_state(moved)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_renumbered_layer_gives_the_same(name: str):
    layer = layer_of(name)
    run, state = program(layer)
    plain = run(state, given(layer))
    np.testing.assert_allclose(plain.y_TD, dense(name), atol=2e-4)
    row_P = np.random.default_rng(1).permutation(EXPERTS)
    moved = run(renumbered(state, Placement(row_P[None], 2, "any")), given(layer))
    np.testing.assert_allclose(moved.y_TD, plain.y_TD, atol=1e-5)
    np.testing.assert_array_equal(row_P[moved.routing.ids_TK], plain.routing.ids_TK)
    np.testing.assert_array_equal(moved.stats.counts_E, np.asarray(plain.stats.counts_E)[row_P])
    assert (moved.stats.counts_E != plain.stats.counts_E).any()


# every router by one transport; inputs and outputs of experts, which transports carry, by all transports
PAIRS = [(name, TRANSPORTS[i % 3]) for i, name in enumerate(VARIANTS)]
PAIRS += [(n, t) for n in ("gpt-oss", "llama4") for t in TRANSPORTS if (n, t) not in PAIRS]


@pytest.mark.parametrize(("name", "transport"), PAIRS)
def test_every_transport_gives_the_dense_output(name: str, transport: str):
    """Biases are added once, though an expert is split over two tensor ranks."""
    layer = layer_of(name, mesh_of((1, 4, 2)), MoEConfig(transport=transport))
    run, state = program(layer)
    out = run(state, given(layer))
    np.testing.assert_allclose(out.y_TD, dense(name), atol=2e-4)
    assert out.stats.counts["remote_assignments"] > 0 == out.stats.counts["dropped"]


def stored(layer: MoELayer) -> ExpertWeights:
    """Returns the layer's experts as the host's memory holds those of a model of one layer."""
    host = HostExperts(layer.cfg, ParamMaker(jnp.dtype(layer.cfg.dtype), nnx.Rngs(0))).weights
    return jax.tree.map(lambda a, like: a[None].view(like.dtype), layer.experts.weights, host)


def cache_over(store: ExpertWeights) -> ExpertCache:
    """Returns a cache with fewer experts than a step needs, so that some are evicted and some stream."""
    often_LE = -np.arange(EXPERTS, dtype=np.float32)[None]
    table, moves = fill(new_table(SLOTS, 1, EXPERTS, np), often_LE)
    pool = jax.tree.map(lambda a: jnp.zeros((SLOTS + 1, *a.shape[2:]), a.dtype), store)
    pool = jax.jit(copy_in)(pool, store, jax.tree.map(jnp.asarray, moves))
    settings = CacheSettings(lru, 1, 1)
    return ExpertCache(jax.tree.map(jnp.asarray, table), NoPredictor(1, EXPERTS), pool, settings, False)


def first_visit(store: ExpertWeights, cache: ExpertCache, x_TD: jax.Array, phase: Phase) -> Visit:
    none = jnp.zeros(ROWS, jnp.int32)
    return Visit.begin(store, cache, StepView(none, x_TD, VALID, none) if phase == "decode" else None)


@lru_cache
def visit_program(apply: ExpertMath, k: int):
    """Returns one program for all routers: the cache sees what a router chose, not which router chose."""

    @jax.jit
    def run(store, cache, x_TD, routing):
        phases: tuple[Phase, ...] = ("decode", "prefill")
        visits = [first_visit(store, cache, x_TD, phase) for phase in phases]
        return [
            v.run(x_TD, routing, routing, VALID, p, apply, local) for v, p in zip(visits, phases, strict=True)
        ]

    return run


@pytest.mark.parametrize("name", VARIANTS)
def test_offloaded_experts_give_the_dense_output(name: str):
    layer, variant = layer_of(name), VARIANTS[name]
    x_TD, store = given(layer), stored(layer)
    routing = router(variant)(logits(layer).astype(np.float32), variant.correction(), None)
    for y_TD, _, counts, _ in visit_program(layer.math, variant.k)(store, cache_over(store), x_TD, routing):
        np.testing.assert_allclose(y_TD, dense(name), atol=2e-4)
        assert counts["expert_cache_misses"] > 0 and counts["expert_cache_hits"] > 0


@pytest.mark.matrix
@pytest.mark.parametrize(("name", "transport"), [("gpt-oss", "all_to_all"), ("llama4", "replicated")])
def test_bfloat16_gives_the_resident_output(name: str, transport: str):
    """Experts are offloaded, in the layer and on a mesh.

    Biases have another form there, and rows travel in bfloat16.
    """
    layer = layer_of(name, dtype="bfloat16")
    run, state = program(layer)
    resident = np.asarray(run(state, given(layer)).y_TD)
    store = stored(layer)
    away = layer_of(name, moe=MoEConfig(offload=OffloadConfig(memory=1 << 20)), dtype="bfloat16")
    away.router = layer.router
    graph, rest = nnx.split(away)

    @jax.jit
    def sourced(state, store, cache, x_TD):
        visit = first_visit(store, cache, x_TD, "decode")
        return nnx.merge(graph, state)(x_TD, TokenFlags(VALID), "decode", None, visit)

    out = sourced(rest, store, cache_over(store), given(layer))
    np.testing.assert_allclose(out.y_TD, resident, atol=1e-5)
    assert out.stats.counts["expert_cache_misses"] > 0
    spread, state = program(layer_of(name, mesh_of((1, 2, 2)), MoEConfig(transport=transport), "bfloat16"))
    np.testing.assert_allclose(spread(state, given(layer)).y_TD, resident, atol=0.01 * np.abs(resident).max())
