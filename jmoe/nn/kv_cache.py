"""The paged KV cache on the device: its dtype, size and sharding; ``jmoe_kernels.paged_attention`` uses it.

The pages axis is split over the ranks that hold sequences, so entries of page tables are local to a rank.
"""

from collections.abc import Callable
from functools import lru_cache

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jmoe_kernels.grouped_mlp import storage_dtype
from jmoe_kernels.paged_attention import Attention, LayerPages, heads_axis, page_shapes

from jmoe.config import ModelConfig
from jmoe.mesh import TENSOR, TOKENS, platform_of, token_ranks


def kv_dtype(dtype: jnp.dtype, mesh: Mesh) -> jnp.dtype:
    """How keys and values of a ``dtype`` model are kept on ``mesh``: bfloat16 as uint16 on CPU
    (``storage_dtype``), where an update of a bfloat16 array copies it whole (21.8 ms against 0.013)."""
    return storage_dtype(jnp.dtype(dtype), platform_of(mesh))


def stored_kv_heads(cfg: ModelConfig, mesh: Mesh) -> int:
    """KV heads in the cache: replicated up to the tensor-parallel size where that is larger."""
    return max(cfg.num_key_value_heads, mesh.shape[TENSOR])


def page_bytes(cfg: ModelConfig, mesh: Mesh, page_size: int) -> int:
    """Bytes of one page over all layers, keys and values."""
    row = stored_kv_heads(cfg, mesh) * cfg.head_dim * kv_dtype(jnp.dtype(cfg.dtype), mesh).itemsize
    return 2 * cfg.num_hidden_layers * page_size * row


def page_spec(attention: Attention) -> PartitionSpec:
    """Pages over the ranks that hold sequences, heads over the tensor axis."""
    return PartitionSpec(TOKENS, *[None] * (heads_axis(attention) - 1), TENSOR)


def make_pages(
    cfg: ModelConfig, mesh: Mesh, attention: Attention, pages_per_rank: int, page_size: int
) -> list[LayerPages]:
    """Zeroed pages of every layer, committed to the mesh (an uncommitted cache would compile twice)."""
    heads, count = stored_kv_heads(cfg, mesh), pages_per_rank * token_ranks(mesh)
    dtype, where = kv_dtype(jnp.dtype(cfg.dtype), mesh), NamedSharding(mesh, page_spec(attention))
    zeros = [_zeros(s, dtype, where) for s in page_shapes(attention, count, heads, page_size, cfg.head_dim)]
    return [LayerPages(tuple(make() for make in zeros)) for _ in range(cfg.num_hidden_layers)]


@lru_cache(maxsize=8)
def _zeros(shape: tuple[int, ...], dtype: jnp.dtype, where: NamedSharding) -> Callable[[], Array]:
    """A compiled maker of zeros, kept so that a second cache of the same shape does not compile it again."""
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=where)
