"""Heads, new tokens and filled pages that tests share."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jmoe_kernels.backends import AttentionKernel
from jmoe_kernels.paged_attention.api import page_shapes
from jmoe_kernels.paged_attention.types import Heads, LayerPages

SIZE, PAGES, TABLE = 8, 40, 16  # rows of a page, pages of the cache, pages of a table
PLAIN, LATENT = Heads(4, 2, 8), Heads(10, 1, 24, value_dim=16)


def make_inputs(tokens: int, heads: Heads, dtype: Any, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Returns (q, k, v, page tables) of two sequences of ``tokens`` tokens that share no page.

    dtype: dtype of the pages; unless it is float32, the float32 numbers are rounded to bfloat16.

    For latent heads the values are the keys.
    """
    rng = np.random.default_rng(seed)
    q, k, v = (
        rng.standard_normal((2, tokens, n, heads.head_dim)).astype(np.float32)
        for n in (heads.num_query_heads, heads.num_kv_heads, heads.num_kv_heads)
    )
    if dtype != jnp.float32:
        q, k, v = (np.asarray(jnp.asarray(a, jnp.bfloat16).astype(jnp.float32)) for a in (q, k, v))
    table = rng.permutation(PAGES)[: 2 * TABLE].reshape(2, TABLE).astype(np.int32)
    return q, k, k if heads.value_dim else v, table


def make_pages(implementation: AttentionKernel, heads: Heads, dtype: Any) -> LayerPages:
    """Returns pages in the implementation's layout that are full of what earlier sequences left: 7s."""
    shapes = page_shapes(
        implementation, PAGES, heads.num_kv_heads, SIZE, heads.head_dim, heads.value_dim is not None
    )
    number = 7.0 if dtype != jnp.uint16 else 0x40E0  # the bits of a bfloat16 7
    return LayerPages(tuple(jnp.full(shape, number, dtype) for shape in shapes))
