"""The memory that a deployment needs on each device, counted before anything is allocated."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jmoe_kernels.backends import get_backend
from jmoe_kernels.quantised import nbytes_of

from jmoe.blueprint import UNQUANTISED, Codings
from jmoe.checkpoint.params import ParamSpec, abstract_decoder, in_layer
from jmoe.config.model import AttentionKind, ModelConfig
from jmoe.config.units import readable
from jmoe.engine.deployment.room import Room, device_room
from jmoe.engine.deployment.settings import EngineSettings
from jmoe.engine.deployment.sizes import PAGE_SIZE, rank_seats
from jmoe.engine.offload.build import cache_bytes
from jmoe.engine.step.penalties import counts_nbytes
from jmoe.mesh import TENSOR, Split, platform_of
from jmoe.models.decoder import make_blueprint
from jmoe.moe.expert_leaves import UNCODED, layouts_for, store_codings
from jmoe.nn.kinds import kinds_of

PROGRAMS = 128 << 20  # bytes of compiled steps and of whatever else a process grows by


@dataclass(frozen=True)
class Memory:
    """Bytes on each device.

    weights: bytes of the weights, with the pool of offloaded experts.
    step: bytes of the largest step's activations.
    counts: bytes of the counts of each seat's tokens, for penalties.
    programs: code of the compiled steps, and whatever else a process grows by.
    pages: bytes of the KV cache.
    room: memory that is available before anything is loaded; None if unknown.
    """

    weights: int
    step: int
    counts: int
    programs: int
    pages: int
    room: Room | None

    @property
    def total(self) -> int:
        return self.weights + self.step + self.counts + self.programs + self.pages

    @property
    def left(self) -> int | None:
        """The part of the room that is left for the pages, or None if the room is unknown."""
        return None if self.room is None else self.room.bytes - self.total + self.pages

    def __str__(self) -> str:
        parts = (
            ("weights", self.weights), ("a step", self.step), ("token counts", self.counts),
            ("programs", self.programs), ("KV cache", self.pages),
        )  # fmt: skip
        each = " + ".join(f"{name} {readable(size)}" for name, size in parts)
        return f"{each} = {readable(self.total)} on each device, which has {self.room or 'an unknown size'}"


def needed(
    cfg: ModelConfig, settings: EngineSettings, split: Split, length: int, codings: Codings = UNQUANTISED
) -> Memory:
    """Returns the memory needed without pages, whose number depends on what is left."""
    mesh = split.mesh
    own = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    shared = len(own) if get_backend(platform_of(mesh)).has_host_memory else 1
    rooms = [room for device in own if (room := device_room(device, shared)) is not None]
    return Memory(
        weight_bytes(cfg, settings, mesh, codings),
        step_bytes(cfg, settings, split, length),
        counts_nbytes(split.sequence_ranks * rank_seats(settings, split)[0], cfg.vocab_size),
        PROGRAMS // shared,
        0,
        min(rooms, key=lambda room: room.bytes, default=None),
    )


def check_memory(memory: Memory) -> None:
    """Raises ValueError with the sizes if they exceed the available memory."""
    if memory.room is None or memory.total <= memory.room.bytes:
        return
    advice = "lower kv_memory, max_model_len, max_num_seqs or max_num_batched_tokens"
    if memory.weights > memory.room.bytes:
        advice = "the weights alone do not fit: share them by expert_parallel_size or tensor_parallel_size"
    elif memory.step + memory.counts + memory.pages < memory.programs:
        advice = "free some, or raise the limit"
    raise ValueError(f"the model does not fit the memory: {memory}; {advice}")


@contextmanager
def within(memory: Memory) -> Iterator[None]:
    """Raises a ValueError with the expected sizes if memory runs out inside."""
    try:
        yield
    except MemoryError:
        raise ValueError(f"memory ran out although {memory} was expected") from None
    except jax.errors.JaxRuntimeError as error:
        text = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
            raise
        raise ValueError(f"memory ran out although {memory} was expected: {text[:200]}") from None


def weight_bytes(
    cfg: ModelConfig, settings: EngineSettings, mesh: Mesh, codings: Codings = UNQUANTISED
) -> int:
    """Returns the bytes of weights on a device, with pools of offloaded experts.

    Their host copies count only if the device's memory is the host's. One layer of each kind is described:
    describing hundreds takes seconds. If weights are quantised, each layer is a kind of its own.
    """
    if codings:
        return _bytes_of_all_layers(cfg, settings, mesh, codings)
    dense, alike = frozenset(cfg.mlp_only_layers), dict[tuple[AttentionKind, bool], list[int]]()
    for i in range(cfg.num_hidden_layers):
        alike.setdefault((cfg.attention_kind(i), i in dense), []).append(i)
    layers = list(alike.values())
    described, total = cfg.only([numbers[0] for numbers in layers]), 0
    for path, spec in abstract_decoder(make_blueprint(described, settings.moe, mesh))[1].items():
        layer, _ = in_layer(path)
        size = _device_bytes(spec, mesh)
        if layer >= 0:
            size *= len(layers[layer])
        elif path.startswith("store."):  # all layers' experts in one
            size = size // len(described.moe_layers) * len(cfg.moe_layers)
        total += size
    return total + cache_bytes(cfg, settings.moe.offload, mesh)


def _bytes_of_all_layers(cfg: ModelConfig, settings: EngineSettings, mesh: Mesh, codings: Codings) -> int:
    offload = settings.moe.offload
    blueprint = make_blueprint(cfg, settings.moe, mesh, codings)
    resident = sum(_device_bytes(spec, mesh) for spec in abstract_decoder(blueprint)[1].values())
    stored = UNCODED if offload is None else store_codings(cfg, codings)
    layouts = layouts_for(blueprint.kernels.experts, stored)
    return resident + cache_bytes(cfg, offload, mesh, stored, layouts)


def _device_bytes(spec: ParamSpec, mesh: Mesh) -> int:
    """Returns the bytes of a parameter on a device: none if it is in a host's memory that is not the
    device's."""
    is_host = get_backend(platform_of(mesh)).has_host_memory
    if spec.sharding.memory_kind not in (None, "device") and not is_host:
        return 0
    kept = [array.kept for array in jax.tree.leaves(spec.arrays)]
    return sum(nbytes_of(array.sharding.shard_shape(array.shape), array.dtype) for array in kept)


def step_bytes(cfg: ModelConfig, settings: EngineSettings, split: Split, length: int) -> int:
    """Estimates what the largest step takes besides weights and pages: rows of a layer, logits, page
    tables."""
    seats, _ = rank_seats(settings, split)
    tokens = min(max(PAGE_SIZE, settings.max_num_batched_tokens), seats * length) + seats
    heads = cfg.num_attention_heads * max(kind.query_dim(cfg) for kind in kinds_of(cfg))
    inner = -(-cfg.moe_intermediate_size // split.mesh.shape[TENSOR])
    row = 8 * cfg.hidden_size + 4 * heads + cfg.num_experts_per_tok * (cfg.hidden_size + 3 * inner)
    drawn = 2 * seats * (cfg.vocab_size + -(-length // PAGE_SIZE))
    return jnp.dtype(jnp.float32).itemsize * (tokens * row + drawn)
