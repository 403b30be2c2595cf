"""The paged KV cache on the device: pages of keys and values, written by position, read through page tables.

A layer's pages are ``[pages, kv heads, page size, head dim]``. A sequence's page table lists its pages in
order; position p lives in row ``p % page_size`` of page ``table[p // page_size]``. The pages axis is split
over the ranks that hold sequences, so table entries are local to a rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float, Int, Shaped
from jmoe_kernels.grouped_mlp import storage_dtype
from jmoe_kernels.matmul import as_float

from jmoe.config import ModelConfig
from jmoe.mesh import TENSOR, TOKENS, platform_of, sharding, token_ranks


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerPages:
    """One layer's keys and values, each ``[pages, kv heads, page size, head dim]``."""

    k_PHSd: Array
    v_PHSd: Array

    @property
    def page_size(self) -> int:
        return self.k_PHSd.shape[2]


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


def page_sharding(mesh: Mesh) -> NamedSharding:
    """Pages over the ranks that hold sequences, heads over the tensor axis."""
    return sharding(mesh, TOKENS, TENSOR)


def make_pages(cfg: ModelConfig, mesh: Mesh, pages_per_rank: int, page_size: int) -> list[LayerPages]:
    """Zeroed pages of every layer, committed to the mesh (an uncommitted cache would compile twice)."""
    shape = (pages_per_rank * token_ranks(mesh), stored_kv_heads(cfg, mesh), page_size, cfg.head_dim)
    zeros = _zeros(shape, kv_dtype(jnp.dtype(cfg.dtype), mesh), page_sharding(mesh))
    return [LayerPages(zeros(), zeros()) for _ in range(cfg.num_hidden_layers)]


@lru_cache(maxsize=8)
def _zeros(shape: tuple[int, ...], dtype: jnp.dtype, where: NamedSharding) -> Callable[[], Array]:
    """A compiled maker of zeros, kept so that a second cache of the same shape does not compile it again."""
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=where)


def write(
    pages: LayerPages,
    k_BTHd: Float[Array, "B T H d"],
    v_BTHd: Float[Array, "B T H d"],
    positions_BT: Int[Array, "B T"],
    table_BM: Int[Array, "B M"],
) -> LayerPages:
    """The pages with the new rows at their positions; rows of position -1 are not written.

    One token a sequence writes a row; a longer run writes whole pages and must start on a page boundary
    with a length that is a multiple of the page size (rows past its end are overwritten later, and no
    query attends to them before).
    """
    k_PHSd = _write(pages.k_PHSd, k_BTHd, positions_BT, table_BM)
    return LayerPages(k_PHSd, _write(pages.v_PHSd, v_BTHd, positions_BT, table_BM))


def _write(
    pages_PHSd: Shaped[Array, "P H S d"],
    new_BTHd: Float[Array, "B T H d"],
    positions_BT: Int[Array, "B T"],
    table_BM: Int[Array, "B M"],
) -> Shaped[Array, "P H S d"]:
    count, _, size, _ = pages_PHSd.shape
    new = _as_kept(new_BTHd, pages_PHSd.dtype)
    if positions_BT.shape[1] == 1:
        position_B = positions_BT[:, 0]
        page_B = jnp.take_along_axis(table_BM, jnp.maximum(position_B, 0)[:, None] // size, axis=1)[:, 0]
        page_B = jnp.where(position_B >= 0, page_B, count)
        return pages_PHSd.at[page_B, :, position_B % size].set(new[:, 0], mode="drop")
    b, t, h, d = new.shape
    if t % size:
        raise ValueError(f"a run of {t} tokens is not a multiple of the page size {size}")
    first_BN = positions_BT[:, ::size]
    page_BN = jnp.take_along_axis(table_BM, jnp.maximum(first_BN, 0) // size, axis=1)
    page_BN = jnp.where(first_BN >= 0, page_BN, count)
    runs = new.reshape(b, t // size, size, h, d).swapaxes(2, 3)
    return pages_PHSd.at[page_BN.reshape(-1)].set(runs.reshape(-1, h, size, d), mode="drop")


def _as_kept(new: Array, dtype: jnp.dtype) -> Array:
    return (
        lax.bitcast_convert_type(new.astype(jnp.bfloat16), dtype)
        if dtype == jnp.uint16
        else new.astype(dtype)
    )


def read(pages_PHSd: Shaped[Array, "P H S d"], ids_BN: Int[Array, "B N"]) -> Float[Array, "B H N*S d"]:
    """The rows of each sequence's pages ``ids_BN`` in order, in the model's dtype.

    Heads are gathered as pages of their own, so that the result needs no transposition.
    """
    _, h, size, d = pages_PHSd.shape
    b, n = ids_BN.shape
    ids_BHN = ids_BN[:, None] * h + jnp.arange(h, dtype=jnp.int32)[None, :, None]
    flat = pages_PHSd.reshape(-1, size * d).at[ids_BHN.reshape(-1)].get(mode="promise_in_bounds")
    return as_float(flat).reshape(b, h, n * size, d)
