"""The expert cache of a model whose experts are offloaded: its size, what it starts with, its predictor."""

from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jmoe_kernels.grouped_mlp import ExpertWeights, storage_dtype

from jmoe.checkpoint.identity import model_identity
from jmoe.config import ModelConfig, MoEConfig
from jmoe.engine.stats import expert_bytes
from jmoe.grouping.profile import Profile
from jmoe.mesh import platform_of, sharding
from jmoe.models.decoder import Decoder
from jmoe.offload.cache import ExpertCache
from jmoe.offload.copies import copy_in
from jmoe.offload.predictors import make_predictor
from jmoe.offload.table import Moves, Rule, Table, fill, new_table
from jmoe.offload.types import Predictor
from jmoe.techniques import OffloadConfig


def read_profile(offload: OffloadConfig | None) -> Profile | None:
    """The profile that is configured; ValueError where it cannot be read. ``make_cache`` checks whose."""
    return None if offload is None or offload.store is None else Profile.load(Path(offload.store))


def make_cache(model: Decoder, mesh: Mesh, seats: int, profile: Profile | None) -> ExpertCache:
    """A full pool: the experts that the profile saw most often, else the first ones of every layer.

    seats: the most requests that run at once. ValueError for the profile of another model.
    """
    cfg, offload = model.cfg, model.moe.offload
    assert offload is not None
    if profile is not None and profile.model != (own := model_identity(model)):
        raise ValueError(f"{offload.store} was made from {profile.model}, this is {own}: profile it anew")
    shape = len(cfg.moe_layers), cfg.num_experts
    often_LE = np.broadcast_to(-np.arange(cfg.num_experts), shape) if profile is None else profile.loads_LE
    embeddings_VD = np.asarray(model.embed[...]).astype(np.float32)
    with jax.set_mesh(mesh):
        predictor = _predictor(cfg, offload, seats, embeddings_VD, profile)
    slots = count_slots(cfg, offload)
    table, moves = fill(new_table(slots, *shape, np), often_LE.astype(np.float32))
    start = jax.jit(partial(_fill_pool, empty_pool(cfg, slots, platform_of(mesh))))
    table, predictor, pool = jax.device_put(
        (table, predictor, start(model.store.weights, moves)), sharding(mesh)
    )
    return _cache(cfg, model.moe, mesh, table, predictor, pool)


def abstract_cache(cfg: ModelConfig, moe: MoEConfig, mesh: Mesh, seats: int) -> ExpertCache | None:
    """Shapes of a cache without a profile, for compiling a step; None where nothing is offloaded."""
    offload = moe.offload
    if offload is None:
        return None
    slots, shape = count_slots(cfg, offload), (len(cfg.moe_layers), cfg.num_experts)

    def made() -> ExpertCache:
        any_VD = np.zeros((1, cfg.hidden_size), np.float32)
        predictor = _predictor(cfg, offload, seats, any_VD, None)
        table: Table = jax.tree.map(jnp.asarray, new_table(slots, *shape, np))
        pool = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), empty_pool(cfg, slots, platform_of(mesh)))
        return _cache(cfg, moe, mesh, table, predictor, pool)

    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding(mesh)), jax.eval_shape(made)
    )


def count_slots(cfg: ModelConfig, offload: OffloadConfig) -> int:
    return offload.slots(
        layers=len(cfg.moe_layers), experts=cfg.num_experts, k=cfg.num_experts_per_tok,
        expert_bytes=expert_bytes(cfg),
    )  # fmt: skip


def copies_run_beside(mesh: Mesh) -> bool:
    """Whether a copy inside the step goes on while the device computes. Shown for TPUs, by their compiler."""
    return platform_of(mesh) == "tpu"


def pick_executor(offload: OffloadConfig, platform: str) -> tuple[Literal["graph", "host"], str]:
    """What runs the steps, and why."""
    if offload.executor is not None:
        return offload.executor, "named in the moe config"
    if platform == "gpu":
        return (
            "host",
            "a GPU's compiler makes no asynchronous copies of slices inside a step; device_put does",
        )
    if platform == "tpu":
        return "graph", "the compiler makes a prefetch an asynchronous copy beside the experts"
    return "graph", "one compiled step; driving each layer from the host takes longer on a CPU"


def empty_pool(cfg: ModelConfig, slots: int, platform: str) -> ExpertWeights:
    """Its shapes."""
    dtype = storage_dtype(jnp.dtype(cfg.dtype), platform)
    f, d = cfg.moe_intermediate_size, cfg.hidden_size
    shapes = [(2, f, d), (d, f), *([(2, f), (d,)] if cfg.expert_bias else [])]
    return ExpertWeights(*(jax.ShapeDtypeStruct((slots + 1, *shape), dtype) for shape in shapes))  # pyright: ignore[reportArgumentType]


def _predictor(
    cfg: ModelConfig, offload: OffloadConfig, seats: int, embeddings_VD: np.ndarray, profile: Profile | None
) -> Predictor:
    return make_predictor(
        offload.predictor,
        distance=min(offload.prefetch_distance, len(cfg.moe_layers)), k=cfg.num_experts_per_tok,
        layers=len(cfg.moe_layers), experts=cfg.num_experts, seats=seats, profile=profile,
        embeddings_VD=embeddings_VD, capacity=offload.store_size,
    )  # fmt: skip


def _fill_pool(shapes: ExpertWeights, store: ExpertWeights, moves: Moves) -> ExpertWeights:
    pool = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    return copy_in(pool, store, moves)


def _cache(
    cfg: ModelConfig, moe: MoEConfig, mesh: Mesh, table: Table, predictor: Predictor, pool: ExpertWeights
) -> ExpertCache:
    assert moe.offload is not None
    ahead = min(moe.offload.prefetch_distance, len(cfg.moe_layers))
    rule = Rule(moe.offload.eviction, moe.offload.prefetch_per_layer, ahead)
    return ExpertCache(table, predictor, pool, rule, copies_run_beside(mesh))
