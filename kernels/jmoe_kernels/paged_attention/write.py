"""Writes of new rows into pages, in place: single rows, or whole pages of a longer run.

A write must not take the time of reading or copying the whole pool. Each compiler needs another form of code
for that. XLA on a CPU takes a scatter for an operation on its whole operand. On TPU it gives a scatter of
whole pages, or of rows of one byte a number, a layout that differs from the pool's, and so copies the pool
before and after. On both, updates one after another are in place. On a GPU each update would be a launch;
there, and for other single rows on TPU, one scatter makes all of them.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int, Shaped

from jmoe_kernels.paged_attention.one_byte import quantise_rows, saturated
from jmoe_kernels.paged_attention.types import LayerPages, NewTokens
from jmoe_kernels.quantised import DTYPES

Write = Callable[[Array, Array, Array, Array], Array]


def write(
    pages_PGSd: Shaped[Array, "P G S *d"],
    new_BTGd: Shaped[Array, "B T G *d"],
    positions_BT: Int[Array, "B T"],
    table_BM: Int[Array, "B M"],
) -> Shaped[Array, "P G S *d"]:
    """Returns the pages with the new rows at their positions; position -1 writes nothing. The rows of scales
    are numbers.

    Raises ValueError if a run of several tokens is not a multiple of the page size.
    """
    return _write(pages_PGSd, new_BTGd, positions_BT, table_BM, 2)


def write_pages(new: NewTokens, pages: LayerPages, write_values: Write = write) -> LayerPages:
    """Returns pages, whose layout is not joined, with the rows of the tokens, quantised as the pages are.

    write_values: function that writes the values, and their scales.
    """
    rows = (new.k_BTGd,) if new.v_BTGd is None else (new.k_BTGd, new.v_BTGd)

    def put(into: tuple[Array, ...], rows: Sequence[Array]) -> tuple[Array, ...]:
        three = zip((write, write_values), into, rows, strict=False)
        return tuple(run(kept, own, new.positions_BT, new.table_BM) for run, kept, own in three)

    if pages.scales is None:
        return LayerPages(put(pages.kv, rows))
    pairs = [quantise_rows(own, kept.dtype) for own, kept in zip(rows, pages.kv, strict=True)]
    codes, scales = zip(*pairs, strict=True)
    return LayerPages(put(pages.kv, codes), put(pages.scales, scales))


def write_joined(
    kv_PSGd: Shaped[Array, "P S 2G d"],
    new_BTGd: Float[Array, "B T 2G d"],
    positions_BT: Int[Array, "B T"],
    table_BM: Int[Array, "B M"],
) -> Shaped[Array, "P S 2G d"]:
    """Returns the joined pages with the new rows at their positions; see ``write``."""
    return _write(kv_PSGd, new_BTGd, positions_BT, table_BM, 1)


def write_last(
    pages_PGSd: Shaped[Array, "P G S *d"],
    new_B1Gd: Shaped[Array, "B 1 G *d"],
    positions_B1: Int[Array, "B 1"],
    table_BM: Int[Array, "B M"],
) -> Shaped[Array, "P G S *d"]:
    """Writes rows that are their sequences' last, as ``write`` does, and zeros the rest of their pages."""
    count, _, size, *rest = pages_PGSd.shape
    rows_BS = jnp.arange(size, dtype=jnp.int32)[None]
    is_new_BS = positions_B1 % size == rows_BS
    page_B1 = jnp.take_along_axis(table_BM, jnp.maximum(positions_B1, 0) // size, axis=1)
    page_BS = jnp.where((positions_B1 >= 0) & (positions_B1 % size <= rows_BS), page_B1, count)
    is_new = is_new_BS.reshape(*is_new_BS.shape, 1, *[1] * len(rest))
    new_B1Gd = _to_storage(new_B1Gd, pages_PGSd.dtype)
    blocks_BSGd = jnp.where(is_new, new_B1Gd, jnp.zeros((), new_B1Gd.dtype))
    rows_BS = jnp.broadcast_to(rows_BS, page_BS.shape)
    return pages_PGSd.at[page_BS, :, rows_BS].set(blocks_BSGd, mode="drop")


def _write(pages: Array, new_BTGd: Array, positions_BT: Array, table_BM: Array, axis: int) -> Array:
    """Writes rows into pages.

    axis: axis of the pages on which a page's rows lie.
    """
    size, (_, t, *row) = pages.shape[axis], new_BTGd.shape
    if t > 1 and t % size:
        raise ValueError(f"a run of {t} tokens is not a multiple of the page size {size}")
    step = min(t, size)
    blocks_N = _to_storage(new_BTGd, pages.dtype).reshape(-1, step, *row)
    blocks_N = blocks_N.swapaxes(1, 2) if axis == 2 else blocks_N
    position_BN = positions_BT[:, ::step]
    page_BN = jnp.take_along_axis(table_BM, jnp.maximum(position_BN, 0) // size, axis=1)
    page_N = jnp.where(position_BN >= 0, page_BN, -1).reshape(-1)
    row_N = jnp.maximum(position_BN, 0).reshape(-1) % size
    each, scatter = partial(_update_each, axis=axis), partial(_scatter_all, axis=axis)
    has_other_layout = t > 1 or pages.dtype.itemsize == 1 or pages.ndim == 3  # in a scatter on a TPU
    forms = {"cpu": each, "tpu": each} if has_other_layout else {"cpu": each}
    return lax.platform_dependent(pages, blocks_N, page_N, row_N, default=scatter, **forms)


def _to_storage(new: Array, dtype: jnp.dtype) -> Array:
    """Returns ``new`` in the pages' dtype; uint16 pages hold the bits of bfloat16."""
    if dtype == jnp.uint16:
        return lax.bitcast_convert_type(new.astype(jnp.bfloat16), dtype)
    if dtype == DTYPES["e4m3"] and new.dtype != dtype:
        return saturated(new, dtype)
    return new.astype(dtype)


def _update_each(pages: Array, blocks_N: Array, page_N: Array, row_N: Array, *, axis: int) -> Array:
    """Makes one update after another. A page of -1 means none: the content of page 0 is written again."""

    def put(i: Array, pages: Array) -> Array:
        start = [jnp.maximum(page_N[i], 0), *[jnp.zeros((), jnp.int32)] * (pages.ndim - 1)]
        start[axis] = row_N[i]
        block = lax.dynamic_index_in_dim(blocks_N, i)
        old_block = lax.dynamic_slice(pages, start, block.shape)
        return lax.dynamic_update_slice(pages, jnp.where(page_N[i] >= 0, block, old_block), start)

    return lax.fori_loop(0, len(page_N), put, pages)


def _scatter_all(pages: Array, blocks_N: Array, page_N: Array, row_N: Array, *, axis: int) -> Array:
    """Makes one scatter, which drops what would go past the last page."""
    page_N = jnp.where(page_N >= 0, page_N, len(pages))
    if blocks_N.shape[axis] == pages.shape[axis]:
        return pages.at[page_N].set(blocks_N, mode="drop")
    index = (page_N, slice(None), row_N) if axis == 2 else (page_N, row_N)
    return pages.at[index].set(jnp.squeeze(blocks_N, axis), mode="drop")
