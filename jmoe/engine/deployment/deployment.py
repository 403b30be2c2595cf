"""Resolves a model and settings for this machine, once: ``serve`` runs the result, ``doctor`` reports it.

**Memory.** What does not fit is refused in one line that has the sizes, before weights are read. Weights come
first, then what a step needs, then the pages of the KV cache. Without ``kv_memory`` the pages are those of
``max_num_seqs`` whole contexts, but at most 2 GiB or one context, and at most half of what is left. If they
do not hold one context, the line names the ``max_model_len`` that they do hold. If ``kv_memory`` does not
hold the model's own context, the context is shortened and the log says so; a requested context is refused
instead. Several processes must compute the same sizes without communicating, so their pages do not depend on
what a machine has left.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jmoe_kernels.backends import get_backend

from jmoe.checkpoint import read_config
from jmoe.checkpoint.params import abstract_decoder, in_layer
from jmoe.config.model import ModelConfig
from jmoe.config.units import readable
from jmoe.engine.deployment.memory import Room, device_room
from jmoe.engine.deployment.settings import EngineSettings, model_directory
from jmoe.engine.offload.build import cache_bytes
from jmoe.engine.step.inputs import Sizes
from jmoe.mesh import EXPERT, TENSOR, Split, make_mesh, platform_of, split_attention
from jmoe.nn.kinds import page_bytes

PAGE_SIZE = 32  # tokens
DEFAULT_KV_BYTES = 2 << 30
PROGRAMS = 128 << 20  # bytes of compiled steps and of whatever else a process grows by


@dataclass(frozen=True)
class Memory:
    """Bytes on each device.

    weights: the weights, with the pool of offloaded experts.
    step: the largest step's activations.
    programs: code of the compiled steps, and whatever else a process grows by.
    pages: the KV cache.
    room: memory that is available before anything is loaded; None if unknown.
    """

    weights: int
    step: int
    programs: int
    pages: int
    room: Room | None

    @property
    def total(self) -> int:
        return self.weights + self.step + self.programs + self.pages

    @property
    def left(self) -> int | None:
        """What all but the pages leave of the room; None if unknown."""
        return None if self.room is None else self.room.bytes - self.total + self.pages

    def __str__(self) -> str:
        parts = (
            ("weights", self.weights), ("a step", self.step), ("programs", self.programs),
            ("KV cache", self.pages),
        )  # fmt: skip
        each = " + ".join(f"{name} {readable(size)}" for name, size in parts)
        return f"{each} = {readable(self.total)} on each device, which has {self.room or 'an unknown size'}"


@dataclass(frozen=True)
class Deployment:
    """What a model and settings result in on this machine.

    notes: what the user should know about settings that were changed or have no effect, a line each.
    """

    directory: Path
    cfg: ModelConfig
    split: Split
    max_model_len: int
    sizes: Sizes
    memory: Memory
    notes: tuple[str, ...]


def resolve(model: str | Path, settings: EngineSettings) -> Deployment:
    """Raises ValueError if the model or the settings would be refused, or do not fit the machine."""
    directory = model_directory(model)
    cfg = read_config(directory, settings.dtype)
    split = settings_split(settings)
    asked = context_length(cfg, settings.max_model_len)
    memory = needed(cfg, settings, split, asked)
    check_memory(memory)
    length, pages, notes = fit_pages(cfg, settings, split, asked, memory)
    sizes = sizes_for(settings, split, length, pages)
    held = pages * page_bytes(cfg, split, PAGE_SIZE) // split.head_ranks
    memory = replace(needed(cfg, settings, split, length), pages=held)
    check_memory(memory)
    notes += settings.without_effect(*split.mesh.shape.values())
    return Deployment(directory, cfg, split, length, sizes, memory, tuple(notes))


def needed(cfg: ModelConfig, settings: EngineSettings, split: Split, length: int) -> Memory:
    """The memory needed without pages, whose number depends on what is left."""
    mesh = split.mesh
    own = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    shared = len(own) if get_backend(platform_of(mesh)).has_host_memory else 1
    rooms = [room for device in own if (room := device_room(device, shared)) is not None]
    return Memory(
        weight_bytes(cfg, settings, mesh),
        step_bytes(cfg, settings, split, length),
        PROGRAMS // shared,
        0,
        min(rooms, key=lambda room: room.bytes, default=None),
    )


def check_memory(memory: Memory) -> None:
    """Raises ValueError with the sizes if they exceed the memory there is."""
    if memory.room is None or memory.total <= memory.room.bytes:
        return
    advice = "lower kv_memory, max_model_len, max_num_seqs or max_num_batched_tokens"
    if memory.weights > memory.room.bytes:
        advice = "the weights alone do not fit: share them by expert_parallel_size or tensor_parallel_size"
    elif memory.step + memory.pages < memory.programs:
        advice = "free some, or raise the limit"
    raise ValueError(f"the model does not fit the memory: {memory}; {advice}")


@contextmanager
def within(memory: Memory) -> Iterator[None]:
    """Turns memory that runs out all the same into a ValueError with the sizes."""
    try:
        yield
    except MemoryError:
        raise ValueError(f"memory ran out although {memory} was expected") from None
    except jax.errors.JaxRuntimeError as error:
        text = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
            raise
        raise ValueError(f"memory ran out although {memory} was expected: {text[:200]}") from None


def fit_pages(
    cfg: ModelConfig, settings: EngineSettings, split: Split, length: int, memory: Memory
) -> tuple[int, int, list[str]]:
    """(Tokens of a context, pages of a rank, notes); ValueError if the context must shrink and may not."""
    one_page, table = page_bytes(cfg, split, PAGE_SIZE), -(-length // PAGE_SIZE)
    if settings.kv_memory is not None:
        pages, of = settings.kv_memory // one_page, f"kv_memory {readable(settings.kv_memory)}"
        if pages < 1:
            raise ValueError(
                f"kv_memory {settings.kv_memory} bytes holds no page; one takes {one_page} bytes"
            )
    else:
        pages, of = rank_slots(settings, split)[0] * table, "half of what the rest leaves of the memory"
        pages = max(table, min(pages, DEFAULT_KV_BYTES // one_page))
        if memory.left is not None and jax.process_count() == 1:
            pages = min(pages, memory.left // 2 * split.head_ranks // one_page)
    if pages >= table:
        return length, pages, []
    lack = (
        f"a context of {length} tokens (max_model_len) needs a KV cache of {readable(table * one_page)} on "
        f"each rank, and {of} holds {pages * PAGE_SIZE} tokens"
    )
    if settings.kv_memory is None:
        fits = f"max_model_len {pages * PAGE_SIZE} fits" if pages > 0 else "not one page fits"
        raise ValueError(f"{lack}: {fits}")
    if settings.max_model_len is not None:
        raise ValueError(f"{lack}: lower max_model_len or raise kv_memory")
    note = f"{lack}: the context is shortened to them; set max_model_len or kv_memory"
    return pages * PAGE_SIZE, pages, [note]


def sizes_for(settings: EngineSettings, split: Split, max_model_len: int, pages: int) -> Sizes:
    """Shapes to compile: 1, 4, 8, 16 ... sequences; 1, 2, 4, 8 ... rows of prompts' tokens.

    Both are multiples of the number of ranks that share the heads of a sequence and split its tokens.
    """
    slots, sharing = rank_slots(settings, split)
    step, row = math.lcm(PAGE_SIZE, sharing), get_backend(platform_of(split.mesh)).num_row_tokens
    most = round_up(max(PAGE_SIZE, settings.max_num_batched_tokens), step)
    run = min(round_up(row, step), most, round_up(max_model_len, step))
    rows = min(-(-most // run), slots * -(-max_model_len // run))
    decode = {*_steps(1, min(4, slots), 4), *_steps(min(4, slots), slots, 2)}
    return Sizes(
        tuple(sorted({round_up(n, sharing) for n in decode})),
        tuple(count * run for count in _steps(1, rows, 2)),
        PAGE_SIZE, pages, -(-max_model_len // PAGE_SIZE),
    )  # fmt: skip


def rank_slots(settings: EngineSettings, split: Split) -> tuple[int, int]:
    """Sequences that run on a rank at once, and the ranks that share the tokens of each."""
    sharing = split.mesh.shape[EXPERT] if EXPERT in split.heads else 1
    return round_up(-(-settings.max_num_seqs // split.sequence_ranks), sharing), sharing


def weight_bytes(cfg: ModelConfig, settings: EngineSettings, mesh: Mesh) -> int:
    """Bytes of weights on a device, with pools of offloaded experts.

    Their host copies count only if the device's memory is the host's. One layer of each kind is described:
    describing hundreds takes seconds.
    """
    moe_layers = len(cfg.moe_layers)
    counts = (cfg.num_hidden_layers - moe_layers, moe_layers) if cfg.mlp_only_layers else (moe_layers,)
    kinds = replace(
        cfg, num_hidden_layers=len(counts), mlp_only_layers=(0,) if len(counts) == 2 else (), layer_types=(),
        no_rope_layers=(),
    )  # fmt: skip
    is_host, total = get_backend(platform_of(mesh)).has_host_memory, 0
    for path, spec in abstract_decoder(kinds, settings.moe, mesh)[1].items():
        layer, _ = in_layer(path)
        times = counts[layer] if layer >= 0 else moe_layers if path.startswith("store.") else 1
        shape = spec.sharding.shard_shape(spec.shape)
        if spec.sharding.memory_kind in (None, "device") or is_host:
            total += times * math.prod(shape) * spec.dtype.itemsize
    return total + cache_bytes(cfg, settings.moe.offload, mesh)


def step_bytes(cfg: ModelConfig, settings: EngineSettings, split: Split, length: int) -> int:
    """About what the largest step takes besides weights and pages: rows of a layer, logits, page tables."""
    slots, _ = rank_slots(settings, split)
    tokens = min(max(PAGE_SIZE, settings.max_num_batched_tokens), slots * length) + slots
    heads = cfg.num_attention_heads * (cfg.latent.qk_head_dim if cfg.latent else cfg.head_dim)
    inner = -(-cfg.moe_intermediate_size // split.mesh.shape[TENSOR])
    row = 8 * cfg.hidden_size + 4 * heads + cfg.num_experts_per_tok * (cfg.hidden_size + 3 * inner)
    drawn = 2 * slots * (cfg.vocab_size + -(-length // PAGE_SIZE))
    return jnp.dtype(jnp.float32).itemsize * (tokens * row + drawn)


def settings_split(settings: EngineSettings) -> Split:
    """The mesh of the settings' sizes, and how attention is split over it."""
    sizes = settings.data_parallel_size, settings.expert_parallel_size, settings.tensor_parallel_size
    return split_attention(make_mesh(*sizes), settings.attention)


def context_length(cfg: ModelConfig, asked: int | None) -> int:
    """``asked``, or the model's own; ValueError if ``asked`` is less than 1 or more than the model's."""
    limit = cfg.longest_context
    if asked is not None and not 1 <= asked <= limit:
        raise ValueError(f"max_model_len must be between 1 and the model's {limit}, got {asked}")
    return asked or limit


def round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def _steps(first: int, last: int, factor: int) -> tuple[int, ...]:
    sizes = []
    while first < last:
        sizes.append(first)
        first *= factor
    return (*sizes, last)
