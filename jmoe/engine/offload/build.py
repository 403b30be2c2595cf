"""The expert cache of a model whose experts are offloaded: its size, first contents and predictor."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jmoe_kernels.backends import Executor, get_backend
from jmoe_kernels.grouped_mlp import ExpertWeights, storage_dtype
from jmoe_kernels.quantised import Quantised, code_storage

from jmoe.checkpoint.identity import model_identity
from jmoe.config.model import ModelConfig
from jmoe.config.moe import MoEConfig
from jmoe.config.techniques import OffloadConfig
from jmoe.mesh import DATA, EXPERT, TENSOR, TOKENS, is_single, platform_of, split_attention
from jmoe.models.decoder import Decoder
from jmoe.moe.expert_leaves import (
    IN_ROWS,
    UNCODED,
    ExpertLeaf,
    LeafCodings,
    LeafLayouts,
    codings_of,
    expert_bytes,
    layouts_of,
    leaves_of,
    weight_specs,
)
from jmoe.offload.cache import ExpertCache
from jmoe.offload.copies import copy_in
from jmoe.offload.policy import RULES
from jmoe.offload.predictors.base import PredictorInputs, PredictorSizes
from jmoe.offload.predictors.history import History, RenumberedHistory
from jmoe.offload.predictors.make import PREDICTORS, make_predictor
from jmoe.offload.ranks import COPIES, SAME, TABLE, Ranks
from jmoe.offload.slot_table import CacheSettings, Copies, SlotTable, fill, new_table
from jmoe.offload.types import Predictor
from jmoe.placement.placement import Placement
from jmoe.placement.profile import Profile


def make_cache(
    model: Decoder, mesh: Mesh, seats: int, profile: Profile | None, placement: Placement | None = None
) -> ExpertCache:
    """Makes a cache with full pools; raises ValueError for the profile of another model.

    Each rank's pool has those of its experts that the profile saw most often or, without a profile, the first
    experts of every layer.

    seats: largest number of requests that run at once on a rank.
    placement: placement by which the experts were renumbered.
    """
    cfg, offload = model.cfg, model.moe.offload
    assert offload is not None
    history = _renumbered(profile, model, placement)
    shape, num_local = (len(cfg.moe_layers), cfg.num_experts), _local_experts(cfg, mesh)
    # without a profile: the first experts of each rank, in every layer alike
    first_LE = np.broadcast_to(-np.arange(cfg.num_experts) % num_local, shape)
    loads_LE = first_LE if history is None else history.loads_LE
    embeddings_VD = np.asarray(model.embed[...]).astype(np.float32)
    with jax.set_mesh(mesh):
        predictor = _predictor(cfg, model.moe, mesh, seats, embeddings_VD, history)
    ranks, store = _ranks(mesh), model.store.weights
    codings = codings_of(store)
    slots = count_slots(cfg, offload, mesh, codings, layouts_of(store))
    table, copies = _full_tables(slots, loads_LE.astype(np.float32), mesh)
    pool = _empty_pool(cfg, slots, mesh, codings, layouts_of(store))
    specs = (weight_specs(store, None, EXPERT), COPIES), _pool_specs(pool)
    start = ranks.over(partial(_fill_pool, pool), *specs)
    cache = _cache(cfg, model.moe, mesh, table, predictor, jax.jit(start)(store, copies))
    return jax.device_put(cache, _shardings(cache, mesh))


def abstract_cache(model: Decoder, mesh: Mesh, seats: int) -> ExpertCache | None:
    """Returns the shapes of a cache without a profile, for compiling a step, or None if nothing is
    offloaded. The pool has the layout of the model's experts.

    model: the model, or its shapes.
    """
    cfg, moe, offload = model.cfg, model.moe, model.moe.offload
    if offload is None:
        return None
    store = model.store.weights
    codings = codings_of(store)
    layouts = layouts_of(store)
    slots = count_slots(cfg, offload, mesh, codings, layouts)
    all_pools = _empty_pool(cfg, slots, mesh, codings, layouts, is_global=True)

    def make() -> ExpertCache:
        embeddings_VD = np.zeros((1, cfg.hidden_size), np.float32)
        predictor = _predictor(cfg, moe, mesh, seats, embeddings_VD, None)
        table, _ = _full_tables(slots, np.zeros((len(cfg.moe_layers), cfg.num_experts), np.float32), mesh)
        pool = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), all_pools)
        return _cache(cfg, moe, mesh, jax.tree.map(jnp.asarray, table), predictor, pool)

    cache = jax.eval_shape(make)
    shardings = jax.tree.broadcast(_shardings(cache, mesh), cache)
    return jax.tree.map(
        lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), cache, shardings
    )


def count_slots(
    cfg: ModelConfig,
    offload: OffloadConfig,
    mesh: Mesh,
    codings: LeafCodings = UNCODED,
    layouts: LeafLayouts = IN_ROWS,
) -> int:
    """Returns the number of slots of each device's pool."""
    num_local = _local_experts(cfg, mesh)
    return offload.slots(
        layers=len(cfg.moe_layers), experts=num_local, k=min(cfg.num_experts_per_tok, num_local),
        expert_bytes=expert_bytes(cfg, codings, mesh.shape[TENSOR], layouts),
    )  # fmt: skip


def cache_bytes(
    cfg: ModelConfig,
    offload: OffloadConfig | None,
    mesh: Mesh,
    codings: LeafCodings = UNCODED,
    layouts: LeafLayouts = IN_ROWS,
) -> int:
    """Returns the device bytes that offloaded experts take: the pool, experts on their way, the predictor's
    store."""
    if offload is None:
        return 0
    slots = count_slots(cfg, offload, mesh, codings, layouts) + offload.num_extra_experts
    store_bytes = PREDICTORS[offload.predictor].store_bytes(
        layers=len(cfg.moe_layers), experts=cfg.num_experts, width=cfg.hidden_size,
        store_size=offload.store_size,
    )  # fmt: skip
    return slots * expert_bytes(cfg, codings, mesh.shape[TENSOR], layouts) + store_bytes


def has_parallel_copies(mesh: Mesh) -> bool:
    """Returns whether a copy inside the step runs while the device computes."""
    return get_backend(platform_of(mesh)).has_parallel_copies


def pick_executor(offload: OffloadConfig, mesh: Mesh) -> tuple[Executor, str]:
    """Returns the executor of the steps, and why it was chosen."""
    if offload.executor is not None:
        return offload.executor, "named in the moe config"
    if not is_single(mesh):
        return "graph", "each rank of a mesh decides and copies inside the step; the host drives one device"
    backend = get_backend(platform_of(mesh))
    return backend.executor, backend.why_executor


def _renumbered(profile: Profile | None, model: Decoder, placement: Placement | None) -> History | None:
    """Returns the profile with this model's expert numbers; raises ValueError if it is of another model."""
    if profile is None:
        return None
    if profile.model != (own := model_identity(model, placement)):
        offload = model.moe.offload
        assert offload is not None
        raise ValueError(f"{offload.store} was made from {profile.model}, this is {own}: profile it anew")
    return profile if placement is None else RenumberedHistory(profile, placement.experts_LP)


def _local_experts(cfg: ModelConfig, mesh: Mesh) -> int:
    """Returns the number of experts of a layer on each rank."""
    return cfg.num_experts // mesh.shape[EXPERT]


def _ranks(mesh: Mesh) -> Ranks:
    return Ranks(None if is_single(mesh) else mesh)


def _shardings(cache: ExpertCache, mesh: Mesh) -> Any:
    return jax.tree.map(partial(NamedSharding, mesh), cache.specs)


def _pool_specs(pool: ExpertWeights) -> ExpertWeights:
    return weight_specs(pool, TOKENS)


def _full_tables(slots: int, loads_LE: np.ndarray, mesh: Mesh) -> tuple[SlotTable, Copies]:
    """Returns the tables of all ranks, each with the rank's most often used experts, and the copies to
    make."""
    layers, ranks = len(loads_LE), mesh.shape[EXPERT]
    shares = np.split(loads_LE, ranks, axis=1)
    tables = [fill(new_table(slots, layers, each.shape[1], np), each) for each in shares] * mesh.shape[DATA]

    def joined(spec: PartitionSpec, *parts: np.ndarray) -> np.ndarray:
        return parts[0] if spec == SAME else np.concatenate([np.atleast_1d(part) for part in parts])

    return jax.tree.map(joined, jax.tree.broadcast((TABLE, COPIES), tables[0]), *tables)


def _empty_pool(
    cfg: ModelConfig,
    slots: int,
    mesh: Mesh,
    codings: LeafCodings,
    layouts: LeafLayouts,
    *,
    is_global: bool = False,
) -> ExpertWeights:
    """Returns the shapes of a rank's pool, or of all ranks' pools together if ``is_global``.

    codings, layouts: how the store's leaves are stored, by their names; "rows" is not named.
    """
    plain, platform = jnp.dtype(cfg.dtype), platform_of(mesh)
    parts, ranks = (1, mesh.shape[DATA] * mesh.shape[EXPERT]) if is_global else (mesh.shape[TENSOR], 1)

    def stack(leaf: ExpertLeaf) -> jax.ShapeDtypeStruct | Quantised:
        shape = ranks * (slots + 1), *leaf.shape(cfg, parts)
        if leaf.name not in codings:
            return jax.ShapeDtypeStruct(shape, storage_dtype(plain, platform))
        whole, tensor_parts = leaf.shape(cfg)[-1], leaf.inner_parts(mesh.shape[TENSOR])
        shapes = codings[leaf.name].split(whole, tensor_parts).shapes(shape, plain.name)
        kept = code_storage(shapes.coding.code, platform)
        shapes = replace(shapes, values=jax.ShapeDtypeStruct(shapes.values.shape, kept))
        return shapes.in_layout(layouts.get(leaf.name, "rows"))

    return ExpertWeights(**{leaf.name: stack(leaf) for leaf in leaves_of(cfg)})  # pyright: ignore[reportArgumentType]


def _predictor(
    cfg: ModelConfig, moe: MoEConfig, mesh: Mesh, seats: int, embeddings_VD: np.ndarray,
    history: History | None,
) -> Predictor:  # fmt: skip
    offload, layers = moe.offload, len(cfg.moe_layers)
    assert offload is not None
    return make_predictor(
        offload.predictor,
        PredictorSizes(
            distance=min(offload.prefetch_distance, layers),
            k=cfg.num_experts_per_tok,
            layers=layers,
            experts=cfg.num_experts,
            seats=seats * split_attention(mesh, moe.attention).sequence_ranks,
            store_size=offload.store_size,
        ),
        PredictorInputs(history, embeddings_VD),
    )


def _fill_pool(shapes: ExpertWeights, store: ExpertWeights, copies: Copies) -> ExpertWeights:
    pool = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    return copy_in(pool, store, copies)


def _cache(
    cfg: ModelConfig, moe: MoEConfig, mesh: Mesh, table: SlotTable, predictor: Predictor, pool: ExpertWeights
) -> ExpertCache:
    assert moe.offload is not None
    distance = min(moe.offload.prefetch_distance, len(cfg.moe_layers))
    settings = CacheSettings(RULES[moe.offload.eviction], moe.offload.prefetch_per_layer, distance)
    return ExpertCache(table, predictor, pool, settings, has_parallel_copies(mesh), _ranks(mesh))
