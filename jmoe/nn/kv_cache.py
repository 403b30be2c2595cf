"""The paged KV cache of one layer on the device: its dtype, size and sharding.

The pages axis is split over the ranks that hold sequences, so entries of page tables are local to a rank.
``jmoe.nn.kinds`` makes the state of all layers; ``jmoe_kernels.paged_attention`` reads and writes the pages.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jmoe_kernels.grouped_mlp import storage_dtype
from jmoe_kernels.paged_attention import (
    AttentionKernel,
    LayerPages,
    PageCode,
    has_scales,
    heads_axis,
    page_shapes,
)
from jmoe_kernels.quantised import code_storage

from jmoe.config.choices import KVCacheName
from jmoe.config.model import ModelConfig
from jmoe.mesh import Split, platform_of

# how each setting of the KV cache keeps the numbers
PAGE_CODES: dict[KVCacheName, PageCode | None] = {"auto": None, "int8": "int8", "fp8": "e4m3"}


class StateSizes(NamedTuple):
    """The sizes of the state that a layer keeps on each rank.

    num_pages: pages of the KV cache.
    page_size: tokens of a page.
    num_seats: requests that run at once.
    """

    num_pages: int
    page_size: int
    num_seats: int


@dataclass(frozen=True)
class CachedHeads:
    """The sizes of the data that a layer caches of one token.

    num_heads: heads in the cache.
    dim: values of one cached head's key.
    value_dim: leading values of the key that are the head's value too; None if values are cached apart.
    """

    num_heads: int
    dim: int
    value_dim: int | None = None

    def heads_per_array(self, split: Split) -> int:
        """Returns the number of heads in the cache; if more ranks share the heads, each rank has one."""
        return max(self.num_heads, split.head_ranks)


def kv_dtype(cfg: ModelConfig, mesh: Mesh) -> jnp.dtype:
    """Returns the dtype in which keys and values of a model are stored on ``mesh``.

    On CPU bfloat16 is stored as uint16 (``storage_dtype``), because an update of a bfloat16 array copies the
    whole array there (21.8 ms against 0.013), and eight-bit floats as bytes (``code_storage``).
    """
    code = PAGE_CODES[cfg.kv_cache_dtype]
    if code is not None:
        return jnp.dtype(code_storage(code, platform_of(mesh)))
    return storage_dtype(jnp.dtype(cfg.dtype), platform_of(mesh))


def page_spec(attention: AttentionKernel, split: Split) -> PartitionSpec:
    """Returns the split of pages: the pages axis is split like sequences, the heads axis like heads."""
    return PartitionSpec(split.sequences, *[None] * (heads_axis(attention) - 1), split.heads)


def page_layout(
    heads: CachedHeads, cfg: ModelConfig, split: Split, attention: AttentionKernel, sizes: StateSizes
) -> LayerPages:
    """Returns the arrays of one layer's pages, as shapes with dtypes and shardings."""
    count, is_value = sizes.num_pages * split.sequence_ranks, heads.value_dim is not None
    stored = kv_dtype(cfg, split.mesh)
    where = NamedSharding(split.mesh, page_spec(attention, split))
    num_heads = heads.heads_per_array(split)
    shapes = page_shapes(attention, count, num_heads, sizes.page_size, heads.dim, latent=is_value)

    def arrays(shapes: Iterable[tuple[int, ...]], dtype: Any) -> Any:
        return tuple(jax.ShapeDtypeStruct(shape, dtype, sharding=where) for shape in shapes)

    if cfg.kv_cache_dtype == "auto" or not has_scales(attention):
        return LayerPages(arrays(shapes, stored))
    return LayerPages(arrays(shapes, stored), arrays((shape[:-1] for shape in shapes), jnp.float32))


def zeros(layout: jax.ShapeDtypeStruct) -> Array:
    """Makes zeros committed to their devices (an uncommitted array would compile a step twice)."""
    return _maker(layout.shape, layout.dtype, layout.sharding)()


@lru_cache(maxsize=8)
def _maker(shape: tuple[int, ...], dtype: jnp.dtype, sharding: NamedSharding) -> Callable[[], Array]:
    """Compiles a maker of zeros; it is kept so that a second cache of the same shape does not compile it
    again."""
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)
