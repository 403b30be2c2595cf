"""jax's ragged paged attention, the Pallas kernel for TPUs: prefill and decode alike, from joined pages.

The kernel walks only the pages that a sequence fills, loads several pages ahead of the one in use, and keeps
a running softmax: it is FlashAttention (https://arxiv.org/abs/2205.14135) with a page table. Besides the
causal mask it supports only a window, in jax 0.10 and 0.11. Its scales of quantised pages are two numbers of
the compiled program, so it has none for single rows: e4m3 pages hold the keys and values themselves, rounded
and within its range.
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jmoe_kernels.paged_attention.one_byte import code_of
from jmoe_kernels.paged_attention.types import Heads, LayerPages, NewTokens, beyond_windows
from jmoe_kernels.paged_attention.write import write_joined
from jmoe_kernels.quantised import DTYPES

KEYS_PER_BLOCK, QUERIES_PER_BLOCK = 256, 64  # they fit VMEM at every head count that is supported
VMEM_LIMIT = 64 << 20  # bytes


def limit(heads: Heads, dtype: jnp.dtype) -> str | None:
    """Returns the limit that these heads break, or None."""
    if (reason := lacks(heads)) is not None:
        return reason
    if heads.head_dim % 128:
        return f"the head dimension must be a multiple of 128, got {heads.head_dim}"
    kept = jnp.dtype(dtype) if heads.code is None else DTYPES[heads.code]
    words, rest = divmod(2 * heads.num_kv_heads * kept.itemsize, 4)  # of 32 bits, a token's keys and values
    if rest or (words not in (1, 2, 4, 8) and words % 8):
        given = f"{heads.num_kv_heads} {kept.name} kv heads per rank"
        return f"{given} do not tile; " + (
            "1, 2, 4 and multiples of 8 do in both dtypes" if heads.code is None else "2, 4, 8 and 16 do"
        )
    return None


def lacks(heads: Heads) -> str | None:
    """Returns what these heads need that the kernel does not have, whatever their sizes, or None."""
    if heads.code == "int8":
        return "int8 pages, which have a scale for each row, are not supported"
    return beyond_windows(heads)


def write_tokens(new: NewTokens, pages: LayerPages) -> LayerPages:
    """Returns the pages with the new rows."""
    [kv_PSGd] = pages.kv
    assert new.v_BTGd is not None, "latent pages are refused before"
    joined = jnp.stack([new.k_BTGd, new.v_BTGd], axis=3).reshape(*new.k_BTGd.shape[:2], -1, kv_PSGd.shape[-1])
    return LayerPages((write_joined(kv_PSGd, joined, new.positions_BT, new.table_BM),))


def attend(new: NewTokens, pages: LayerPages, window: int | None) -> Float[Array, "B T H d"]:
    """Returns the output of every query over pages that hold the new rows, zero for padding."""
    [kv_PSGd] = pages.kv
    b, t = new.positions_BT.shape
    if t == 1:
        length_B = jnp.maximum(new.positions_BT[:, 0] + 1, 1)  # padding reads one row of page 0
        ends = jnp.arange(b + 1, dtype=jnp.int32)
        out = _ragged(new.q_BTHd[:, 0], kv_PSGd, length_B, new.table_BM, ends, window)[:, None]
    else:  # one row at a time: the kernel has no place for padding after a row shorter than T

        def attend_row(row: tuple[Array, Array, Array]) -> Array:
            q_THd, positions_T, table_M = row
            length = jnp.maximum(jnp.max(positions_T) + 1, 1)
            count = jnp.maximum(jnp.sum(positions_T >= 0, dtype=jnp.int32), 1)
            ends = jnp.array([0, 1], jnp.int32) * count
            return _ragged(q_THd, kv_PSGd, length[None], table_M[None], ends, window)

        out = lax.map(attend_row, (new.q_BTHd, new.positions_BT, new.table_BM))
    return jnp.where((new.positions_BT >= 0)[:, :, None, None], out, 0.0)


def _ragged(
    q_NHd: Array, kv_PSGd: Array, length_B: Array, table_BM: Array, ends: Array, window: int | None
) -> Array:
    """Runs the kernel on the rows of all sequences, one after another.

    ends: where each sequence ends among the rows, after a zero.
    """
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import (  # slow to import, for TPUs only
        ragged_paged_attention,
    )

    n, _, d = q_NHd.shape
    _, size, _, _ = kv_PSGd.shape
    sequences = jnp.full((1,), length_B.shape[0], jnp.int32)
    is_quantised = code_of(kv_PSGd) is not None
    out = ragged_paged_attention(
        q_NHd.astype(jnp.bfloat16 if is_quantised else kv_PSGd.dtype),
        kv_PSGd,
        length_B,
        table_BM,
        ends,
        sequences,
        sm_scale=d**-0.5,
        sliding_window=window,
        k_scale=1.0 if is_quantised else None,  # with a scale it converts the pages to the queries' dtype
        v_scale=1.0 if is_quantised else None,
        num_kv_pages_per_block=max(1, min(KEYS_PER_BLOCK // size, table_BM.shape[1])),
        num_queries_per_block=min(n, QUERIES_PER_BLOCK),
        vmem_limit_bytes=VMEM_LIMIT,
    )
    return out.astype(jnp.float32)
