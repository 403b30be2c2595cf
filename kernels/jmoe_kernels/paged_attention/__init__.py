"""Causal attention of a step's tokens over a paged KV cache, and the cache's layout."""

from jmoe_kernels.paged_attention.api import (
    Attention,
    attend_all,
    heads_axis,
    page_shapes,
    paged_attention,
    pick,
    supports,
)
from jmoe_kernels.paged_attention.types import Heads, LayerPages, NewTokens, Span

__all__ = [
    "Attention",
    "Heads",
    "LayerPages",
    "NewTokens",
    "Span",
    "attend_all",
    "heads_axis",
    "page_shapes",
    "paged_attention",
    "pick",
    "supports",
]
