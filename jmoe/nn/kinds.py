"""The kinds of attention, by the names that ``ModelConfig.attention_kind`` gives a layer.

A kind is a subclass of ``Attention``. It owns its weights and their names, the size of its rotation and the
layout of its state; everything else here calls the kinds of a model's layers.
"""

import math

import jax
from jmoe_kernels.paged_attention import AttentionKernel, Heads, LayerPages, pick

from jmoe.config.model import AttentionKind, ModelConfig
from jmoe.mesh import Split, platform_of
from jmoe.nn.attention import Attention
from jmoe.nn.grouped_query import GroupedQueryAttention
from jmoe.nn.kv_cache import PAGE_CODES, StateSizes, zeros
from jmoe.nn.latent import LatentAttention

KINDS: dict[AttentionKind, type[Attention]] = {
    "grouped_query": GroupedQueryAttention,
    "latent": LatentAttention,
}


def kind_of(cfg: ModelConfig, layer: int) -> type[Attention]:
    return KINDS[cfg.attention_kind(layer)]


def kinds_of(cfg: ModelConfig) -> tuple[type[Attention], ...]:
    """Returns the kinds of the model's layers, each once."""
    return tuple(dict.fromkeys(kind_of(cfg, layer) for layer in range(cfg.num_hidden_layers)))


def paged_heads(cfg: ModelConfig, split: Split) -> tuple[Heads, ...]:
    """Returns the heads of one rank in every layer whose state is in pages, equal ones once."""

    def heads(layer: int) -> Heads:
        cached = kind_of(cfg, layer).cached_heads(cfg)
        kv = cached.heads_per_array(split) // split.head_ranks
        queries = cfg.num_attention_heads // split.head_ranks
        span, code = cfg.span(layer), PAGE_CODES[cfg.kv_cache_dtype]
        return Heads(queries, kv, cached.dim, span, cfg.attention_sinks, cached.value_dim, code)

    paged = [layer for layer in range(cfg.num_hidden_layers) if kind_of(cfg, layer).state_axis == "page"]
    return tuple(dict.fromkeys(map(heads, paged)))


def page_bytes(cfg: ModelConfig, split: Split, page_size: int) -> int:
    """Returns the bytes of one page over all layers whose state is in pages."""
    kernel: AttentionKernel = "xla"
    if cfg.kv_cache_dtype != "auto":  # it decides whether there are scales
        kernel, _ = pick(platform_of(split.mesh), cfg.dtype, paged_heads(cfg, split))
    layers = state_layout(cfg, split, kernel, StateSizes(1, page_size, 1))
    paged = [kind_of(cfg, layer).state_axis == "page" for layer in range(cfg.num_hidden_layers)]
    arrays = jax.tree.leaves([pages for pages, is_paged in zip(layers, paged, strict=True) if is_paged])
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays) // split.sequence_ranks


def state_layout(
    cfg: ModelConfig, split: Split, kernel: AttentionKernel, sizes: StateSizes
) -> list[LayerPages]:
    """Returns the state of every layer, as shapes with dtypes and shardings."""
    layers = range(cfg.num_hidden_layers)
    return [kind_of(cfg, layer).state_layout(cfg, split, kernel, sizes) for layer in layers]


def make_state(
    cfg: ModelConfig, split: Split, kernel: AttentionKernel, sizes: StateSizes
) -> list[LayerPages]:
    """Makes the state of every layer before the first step: zeros, committed to the mesh."""
    return jax.tree.map(zeros, state_layout(cfg, split, kernel, sizes))
