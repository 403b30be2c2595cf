"""The expert cache of a model whose experts are offloaded: its size, first contents and predictor."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jmoe_kernels.backends import Executor, get_backend
from jmoe_kernels.grouped_mlp import ExpertWeights, storage_dtype

from jmoe.checkpoint.identity import model_identity
from jmoe.config.model import ModelConfig
from jmoe.config.moe import MoEConfig
from jmoe.config.techniques import OffloadConfig
from jmoe.mesh import DATA, EXPERT, TENSOR, TOKENS, is_single, platform_of, split_attention
from jmoe.models.decoder import Decoder
from jmoe.moe.expert_leaves import ExpertLeaf, expert_bytes, leaves_of, weight_specs
from jmoe.offload.cache import ExpertCache
from jmoe.offload.copies import copy_in
from jmoe.offload.predictors.history import History, Renumbered
from jmoe.offload.predictors.make import PredictorSizes, make_predictor
from jmoe.offload.ranks import MOVES, SAME, TABLE, Ranks
from jmoe.offload.table import Moves, Rule, Table, fill, new_table
from jmoe.offload.types import Predictor
from jmoe.placement.placement import Placement
from jmoe.placement.profile import Profile


def make_cache(
    model: Decoder, mesh: Mesh, seats: int, profile: Profile | None, placement: Placement | None = None
) -> ExpertCache:
    """Makes a cache with full pools.

    Each rank's pool has those of its experts that the profile saw most often or, without a profile, the first
    experts of every layer.

    seats: the most requests that run at once on a rank. placement: the placement by which the experts were
    renumbered. Raises ValueError for the profile of another model.
    """
    cfg, offload = model.cfg, model.moe.offload
    assert offload is not None
    history = _by_our_numbers(profile, model, placement)
    shape, held = (len(cfg.moe_layers), cfg.num_experts), _held(cfg, mesh)
    often_LE = (
        np.broadcast_to(-np.arange(cfg.num_experts) % held, shape) if history is None else history.loads_LE
    )
    embeddings_VD = np.asarray(model.embed[...]).astype(np.float32)
    with jax.set_mesh(mesh):
        predictor = _predictor(cfg, model.moe, mesh, seats, embeddings_VD, history)
    slots, ranks, store = count_slots(cfg, offload, mesh), _ranks(mesh), model.store.weights
    table, moves = _full(slots, often_LE.astype(np.float32), mesh)
    pool = _empty(cfg, slots, mesh)
    start = ranks.over(partial(_fill_pool, pool), (weight_specs(store, None, EXPERT), MOVES), _split(pool))
    cache = _cache(cfg, model.moe, mesh, table, predictor, jax.jit(start)(store, moves))
    return jax.device_put(cache, _shardings(cache, mesh))


def abstract_cache(cfg: ModelConfig, moe: MoEConfig, mesh: Mesh, seats: int) -> ExpertCache | None:
    """Shapes of a cache without a profile, for compiling a step; None if nothing is offloaded."""
    offload = moe.offload
    if offload is None:
        return None
    slots = count_slots(cfg, offload, mesh)

    def made() -> ExpertCache:
        any_VD = np.zeros((1, cfg.hidden_size), np.float32)
        predictor = _predictor(cfg, moe, mesh, seats, any_VD, None)
        table, _ = _full(slots, np.zeros((len(cfg.moe_layers), cfg.num_experts), np.float32), mesh)
        pool = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), _empty(cfg, slots, mesh, whole=True))
        return _cache(cfg, moe, mesh, jax.tree.map(jnp.asarray, table), predictor, pool)

    cache = jax.eval_shape(made)
    placed = jax.tree.broadcast(_shardings(cache, mesh), cache)
    return jax.tree.map(lambda a, at: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=at), cache, placed)


def count_slots(cfg: ModelConfig, offload: OffloadConfig, mesh: Mesh) -> int:
    """Number of slots of each device's pool."""
    held = _held(cfg, mesh)
    return offload.slots(
        layers=len(cfg.moe_layers), experts=held, k=min(cfg.num_experts_per_tok, held),
        expert_bytes=expert_bytes(cfg, mesh.shape[TENSOR]),
    )  # fmt: skip


def cache_bytes(cfg: ModelConfig, offload: OffloadConfig | None, mesh: Mesh) -> int:
    """Device bytes that offloaded experts take: the pool, experts on their way, the predictor's table."""
    if offload is None:
        return 0
    slots = count_slots(cfg, offload, mesh) + offload.aside
    entry = len(cfg.moe_layers) * cfg.num_experts + cfg.hidden_size  # float32 numbers per iteration
    kept = 4 * offload.store_size * entry if offload.predictor == "expert_map" else 0
    return slots * expert_bytes(cfg, mesh.shape[TENSOR]) + kept


def has_parallel_copies(mesh: Mesh) -> bool:
    """Whether a copy inside the step runs while the device computes."""
    return get_backend(platform_of(mesh)).has_parallel_copies


def pick_executor(offload: OffloadConfig, mesh: Mesh) -> tuple[Executor, str]:
    """The executor of the steps, and why it was chosen."""
    if offload.executor is not None:
        return offload.executor, "named in the moe config"
    if not is_single(mesh):
        return "graph", "each rank of a mesh decides and copies inside the step; the host drives one device"
    backend = get_backend(platform_of(mesh))
    return backend.executor, backend.why_executor


def _by_our_numbers(profile: Profile | None, model: Decoder, placement: Placement | None) -> History | None:
    """The profile with this model's expert numbers; ValueError if it is of another model."""
    if profile is None:
        return None
    if profile.model != (own := model_identity(model, placement)):
        offload = model.moe.offload
        assert offload is not None
        raise ValueError(f"{offload.store} was made from {profile.model}, this is {own}: profile it anew")
    return profile if placement is None else Renumbered(profile, placement.experts_LP)


def _held(cfg: ModelConfig, mesh: Mesh) -> int:
    """Experts of a layer on each rank."""
    return cfg.num_experts // mesh.shape[EXPERT]


def _ranks(mesh: Mesh) -> Ranks:
    return Ranks(None if is_single(mesh) else mesh)


def _shardings(cache: ExpertCache, mesh: Mesh) -> Any:
    return jax.tree.map(partial(NamedSharding, mesh), cache.specs)


def _split(pool: ExpertWeights) -> ExpertWeights:
    return weight_specs(pool, TOKENS)


def _full(slots: int, often_LE: np.ndarray, mesh: Mesh) -> tuple[Table, Moves]:
    """The tables of all ranks, each with the rank's most often used experts, and the copies to make."""
    layers, ranks = len(often_LE), mesh.shape[EXPERT]
    own = np.split(often_LE, ranks, axis=1)
    tables = [fill(new_table(slots, layers, each.shape[1], np), each) for each in own] * mesh.shape[DATA]

    def joined(spec: PartitionSpec, *parts: np.ndarray) -> np.ndarray:
        return parts[0] if spec == SAME else np.concatenate([np.atleast_1d(part) for part in parts])

    return jax.tree.map(joined, jax.tree.broadcast((TABLE, MOVES), tables[0]), *tables)


def _empty(cfg: ModelConfig, slots: int, mesh: Mesh, *, whole: bool = False) -> ExpertWeights:
    """Shapes of a rank's pool, or of all ranks' pools together if ``whole``."""
    dtype = storage_dtype(jnp.dtype(cfg.dtype), platform_of(mesh))
    parts, ranks = (1, mesh.shape[DATA] * mesh.shape[EXPERT]) if whole else (mesh.shape[TENSOR], 1)

    def stack(leaf: ExpertLeaf) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((ranks * (slots + 1), *leaf.shape(cfg, parts)), dtype)

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
        ),
        history,
        embeddings_VD,
        capacity=offload.store_size,
    )


def _fill_pool(shapes: ExpertWeights, store: ExpertWeights, moves: Moves) -> ExpertWeights:
    pool = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    return copy_in(pool, store, moves)


def _cache(
    cfg: ModelConfig, moe: MoEConfig, mesh: Mesh, table: Table, predictor: Predictor, pool: ExpertWeights
) -> ExpertCache:
    assert moe.offload is not None
    ahead = min(moe.offload.prefetch_distance, len(cfg.moe_layers))
    rule = Rule(moe.offload.eviction, moe.offload.prefetch_per_layer, ahead)
    return ExpertCache(table, predictor, pool, rule, has_parallel_copies(mesh), _ranks(mesh))
