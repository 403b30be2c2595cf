"""Activations as the codes that a matrix unit multiplies with the codes of quantised weights.

A row is ``scale * (256 * a + b)`` of int8 a and b for weights of whole numbers (16 bits), or
``scale * (a + b / 16)`` of e4m3 a and b for weights in e4m3 (8 bits of mantissa). The two terms are rows of
one product, so a window of 16 rows fills a tile of 32: the second term costs nothing there. Terms of a block
of rows follow each other: the first terms of 16 rows, then their second terms. With one term, int8 alone, a
block is 32 rows.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Shaped

TILE = 32  # rows of a tile of eight-bit numbers
LANES = 128  # a scale stands in all lanes of its row
TINY = 1e-30  # rows whose largest number is smaller are zero


def row_scales(x: Float[Array, "M K"], dtype: jnp.dtype, terms: int) -> tuple[Array, Array]:
    """Returns each row's scale and the factor that makes whole codes of its numbers, both ``[M, 1]``; the
    factor of a row of zeros is 0."""
    most = 448.0 if dtype == jnp.float8_e4m3fn else 127.0 if terms == 1 else 127.0 * 256
    peak = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    return peak * (1 / most), jnp.where(peak > TINY, most / peak, 0.0)


def terms_of(x: Float[Array, "M K"], factor: Array, dtype: jnp.dtype, terms: int) -> Sequence[Array]:
    """Returns the terms of ``x * factor``: int32 that fit int8, or float32 that e4m3 holds."""
    scaled = x * factor
    if dtype == jnp.float8_e4m3fn:
        first = scaled.astype(dtype).astype(jnp.float32)
        return (first, (scaled - first) * 16)[:terms]
    whole = jnp.round(scaled).astype(jnp.int32)
    if terms == 1:
        return (whole,)
    high = (whole + 128) >> 8
    return high, whole - (high << 8)


def joined(product: Shaped[Array, "P N"], terms: int, depth: int) -> Float[Array, "M N"]:
    """Returns the products of rows from those of their terms, in units of the rows' scales.

    product: products of the terms' rows, int32 or float32.
    depth: how many products each of them sums.
    """
    if terms == 1:
        return product.astype(jnp.float32)
    width, rows = product.shape[1], TILE // terms
    each = product.reshape(-1, terms, rows, width)
    first, second = each[:, 0].reshape(-1, width), each[:, 1].reshape(-1, width)
    if product.dtype == jnp.float32:
        return first + second * (1 / 16)
    if depth <= 512:  # 127 * 256 * 128 * 512 is below 2^31
        return ((first << 8) + second).astype(jnp.float32)
    return first.astype(jnp.float32) * 256 + second.astype(jnp.float32)


def stacked(parts: Sequence[Array], dtype: jnp.dtype) -> Array:
    """Returns the terms ``[M, K]`` of rows as rows ``[terms * M, K]`` of codes, block after block."""
    rows = TILE // len(parts)
    blocks = [part.reshape(-1, 1, rows, part.shape[1]) for part in parts]
    return jnp.concatenate(blocks, axis=1).reshape(-1, parts[0].shape[1]).astype(dtype)


def split_rows(
    x: Float[Array, "N D"], dtype: jnp.dtype, terms: int, num_sums: int | None
) -> dict[str, Array]:
    """Returns the arrays of rows that the kernels take for quantised weights: "x" ``[terms * N, D]``,
    "scales" ``[N, 128]`` and, for lows, "sums" ``[N, num_sums]`` of equal parts of a row, with lanes of zeros
    behind.

    N is a multiple of a block of rows.
    """
    x = x.astype(jnp.float32)
    scales, factor = row_scales(x, dtype, terms)
    parts = terms_of(x, factor, dtype, terms)
    rows = {"x": stacked(parts, dtype), "scales": jnp.broadcast_to(scales, (len(x), LANES))}
    if num_sums is not None:
        sums = jnp.sum(x.reshape(len(x), num_sums, -1), axis=2)
        rows["sums"] = jnp.pad(sums, ((0, 0), (0, -num_sums % LANES)))
    return rows


def sums_of(x: Float[Array, "M K"], num_sums: int) -> Float[Array, "M L"]:
    """Returns the sums of equal parts of rows, one a lane, inside a kernel."""
    size = x.shape[1] // num_sums
    lane = lax.broadcasted_iota(jnp.int32, (x.shape[0], -(-num_sums // LANES) * LANES), 1)
    total = jnp.zeros(lane.shape, jnp.float32)
    for i in range(num_sums):
        part = jnp.sum(x[:, i * size : (i + 1) * size], axis=1, keepdims=True)
        total = jnp.where(lane == i, part, total)
    return total
