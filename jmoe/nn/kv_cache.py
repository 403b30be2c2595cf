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

from jmoe.config.model import ModelConfig
from jmoe.mesh import Split, platform_of


def kv_dtype(dtype: jnp.dtype, mesh: Mesh) -> jnp.dtype:
    """The dtype in which keys and values of a ``dtype`` model are stored on ``mesh``.

    On CPU bfloat16 is stored as uint16 (``storage_dtype``), because an update of a bfloat16 array copies the
    whole array there (21.8 ms against 0.013).
    """
    return storage_dtype(jnp.dtype(dtype), platform_of(mesh))


def stored_kv_heads(cfg: ModelConfig, split: Split) -> int:
    """KV heads in the cache: replicated up to the number of ranks that share the heads, if that is larger."""
    return max(cfg.cached_heads, split.head_ranks)


def page_bytes(cfg: ModelConfig, split: Split, page_size: int) -> int:
    """Bytes of one page over all layers: keys and values, or one array that serves as both (latent)."""
    item = kv_dtype(jnp.dtype(cfg.dtype), split.mesh).itemsize
    row = stored_kv_heads(cfg, split) * cfg.cached_dim * item
    return (2 if cfg.latent is None else 1) * cfg.num_hidden_layers * page_size * row


def page_spec(attention: Attention, split: Split) -> PartitionSpec:
    """The pages axis is split like sequences, the heads axis like heads."""
    return PartitionSpec(split.sequences, *[None] * (heads_axis(attention) - 1), split.heads)


def page_layout(
    cfg: ModelConfig, split: Split, attention: Attention, pages_per_rank: int, page_size: int
) -> LayerPages:
    """The arrays of one layer's pages, as shapes with dtypes and shardings."""
    heads, count = stored_kv_heads(cfg, split), pages_per_rank * split.sequence_ranks
    dtype = kv_dtype(jnp.dtype(cfg.dtype), split.mesh)
    where = NamedSharding(split.mesh, page_spec(attention, split))
    latent = cfg.latent is not None
    shapes = page_shapes(attention, count, heads, page_size, cfg.cached_dim, latent=latent)
    return LayerPages(tuple(jax.ShapeDtypeStruct(s, dtype, sharding=where) for s in shapes))  # pyright: ignore


def make_pages(
    cfg: ModelConfig, split: Split, attention: Attention, pages_per_rank: int, page_size: int
) -> list[LayerPages]:
    """Zeroed pages of every layer, committed to the mesh (an uncommitted cache would compile twice)."""
    layout = page_layout(cfg, split, attention, pages_per_rank, page_size)
    return [jax.tree.map(_zeros, layout) for _ in range(cfg.num_hidden_layers)]


def _zeros(like: jax.ShapeDtypeStruct) -> Array:
    return _maker(like.shape, like.dtype, like.sharding)()


@lru_cache(maxsize=8)
def _maker(shape: tuple[int, ...], dtype: jnp.dtype, where: NamedSharding) -> Callable[[], Array]:
    """A compiled maker of zeros, kept so that a second cache of the same shape does not compile it again."""
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=where)
