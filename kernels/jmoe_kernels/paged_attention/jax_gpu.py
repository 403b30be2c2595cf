"""Paged attention on NVIDIA GPUs with kernels of libraries: jax's Pallas kernel in decode, cuDNN in prefill.

Decode reads only the pages that a sequence fills. cuDNN's public form takes no page table, so a prefill run
first gathers all pages of its sequence's table. That moves twice the cache's bytes, which is little work
compared with the product. jax 0.11 deprecates the decode kernel and still ships it.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jmoe_kernels.paged_attention.types import Heads, LayerPages, NewTokens, beyond_windows
from jmoe_kernels.paged_attention.write import write, write_last, write_pages
from jmoe_kernels.paged_attention.xla import finite_rows, gather_pages, taint, visible
from jmoe_kernels.settings import Span

KEY_SPLITS = 8  # parts of a sequence's keys that run in parallel
PAGES_PER_BLOCK = 4  # pages that one step of a part reads


def limit(heads: Heads, dtype: jnp.dtype) -> str | None:
    """Returns the limit that these heads break, or None."""
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"keys and values must be bfloat16, got {jnp.dtype(dtype).name}"
    if heads.head_dim not in (16, 32, 64, 128):
        return f"the head dimension must be 16, 32, 64 or 128, got {heads.head_dim}"
    return lacks(heads)


def lacks(heads: Heads) -> str | None:
    """Returns what these heads need that the kernels do not have, whatever their sizes, or None."""
    if heads.span.window is not None:
        return "a sliding window is not supported"
    return beyond_windows(heads)


def write_tokens(new: NewTokens, pages: LayerPages) -> LayerPages:
    """Returns the pages with the new rows.

    After a row that is written alone, its page's values and their scales become zero: the decode kernel gives
    what earlier owners left there a weight of 0, and 0 times NaN is NaN.
    """
    assert new.v_BTGd is not None, "latent pages are refused before"
    return write_pages(new, pages, write_last if new.positions_BT.shape[1] == 1 else write)


def attend(new: NewTokens, pages: LayerPages, *, interpret: bool = False) -> Float[Array, "B T H d"]:
    """Returns the output of every query over pages that hold the new rows, zero for padding."""
    q = new.q_BTHd.astype(pages.kv[0].dtype if pages.code is None else jnp.bfloat16)
    run = _decode if new.positions_BT.shape[1] == 1 else _prefill
    out = run(q, pages, new.positions_BT, new.table_BM, interpret).astype(jnp.float32)
    return jnp.where((new.positions_BT >= 0)[:, :, None, None], out, 0.0)


def _decode(q_BTHd: Array, pages: LayerPages, positions_BT: Array, table_BM: Array, interpret: bool) -> Array:
    """Runs the decode kernel, to which each (sequence, kv head) is a sequence: it wants heads outermost."""
    from jax.experimental.pallas.ops.gpu.paged_attention import (  # slow to import, for GPUs only
        paged_attention,
    )

    (b, _, h, d), (count, g, size, _) = q_BTHd.shape, pages.kv[0].shape
    table = jnp.pad(table_BM, ((0, 0), (0, -table_BM.shape[1] % (KEY_SPLITS * PAGES_PER_BLOCK))))
    is_own = jnp.arange(table.shape[1], dtype=jnp.int32)[None] <= positions_BT // size
    table = jnp.where(is_own, table, table[:, :1])  # a block past the own pages reads the first page again
    table_BGM = table[:, None] * g + jnp.arange(g, dtype=jnp.int32)[None, :, None]
    length_B = jnp.maximum(positions_BT[:, 0] + 1, 1)  # padding reads one row of page 0
    out = paged_attention(
        q_BTHd.reshape(b * g, h // g, d) * d**-0.5,
        *(a.reshape(1, count * g, size, d) for a in pages.kv),
        table_BGM.reshape(b * g, -1),
        jnp.repeat(length_B, g),
        *(a.reshape(1, count * g, size) for a in pages.scales or ()),
        k_splits=KEY_SPLITS,
        pages_per_compute_block=PAGES_PER_BLOCK,
        interpret=interpret,
    )
    return out.reshape(b, 1, h, d)


def _prefill(
    q_BTHd: Array, pages: LayerPages, positions_BT: Array, table_BM: Array, interpret: bool
) -> Array:
    scales = pages.scales or (None, None)
    (k_BGSd, broken_k), (v_BGSd, broken_v) = (
        finite_rows(gather_pages(a, table_BM, own).astype(q_BTHd.dtype))
        for a, own in zip(pages.kv, scales, strict=True)
    )
    keys = jnp.arange(k_BGSd.shape[2], dtype=jnp.int32)[None]
    # A padding query sees the first key: a softmax over nothing is not a number.
    visible_BTS = visible(jnp.maximum(positions_BT, 0), keys, Span())
    length_B = jnp.max(positions_BT, axis=1) + 1
    out = jax.nn.dot_product_attention(
        q_BTHd,
        k_BGSd.swapaxes(1, 2),
        v_BGSd.swapaxes(1, 2),
        mask=visible_BTS[:, None],
        key_value_seq_lengths=jnp.maximum(length_B, 1),
        implementation="xla" if interpret else "cudnn",
    )
    tainted_BGT = taint(visible_BTS[:, None], broken_k | broken_v)
    tainted_BTH = jnp.repeat(tainted_BGT, q_BTHd.shape[2] // k_BGSd.shape[1], axis=1).swapaxes(1, 2)
    return jnp.where(tainted_BTH[..., None], jnp.nan, out)
