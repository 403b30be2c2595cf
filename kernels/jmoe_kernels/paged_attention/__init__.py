"""Causal attention of a step's tokens over a paged KV cache, and the cache's layout.

A sequence's page table lists its pages in order; position p lives in row ``p % S`` of page ``table[p // S]``.

Axes: B sequences, T tokens per sequence, H query heads, G key-value heads, d head dimension;
P pages, S rows of a page (of all keys, after pages are read), M pages of a table; N rows or pages one after
another.
"""

from jmoe_kernels.backends import AttentionKernel
from jmoe_kernels.paged_attention.api import attend_all, has_scales, heads_axis, page_shapes, pick, why_not
from jmoe_kernels.paged_attention.implementations import IMPLEMENTATIONS
from jmoe_kernels.paged_attention.one_byte import PageCode
from jmoe_kernels.paged_attention.types import Heads, LayerPages, NewTokens
from jmoe_kernels.settings import Span

__all__ = [
    "IMPLEMENTATIONS",
    "AttentionKernel",
    "Heads",
    "LayerPages",
    "NewTokens",
    "PageCode",
    "Span",
    "attend_all",
    "has_scales",
    "heads_axis",
    "page_shapes",
    "pick",
    "why_not",
]
