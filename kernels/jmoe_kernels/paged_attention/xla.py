"""The portable form: a loop over blocks of keys with a running softmax."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int, Shaped

from jmoe_kernels.matmul import dot
from jmoe_kernels.paged_attention.one_byte import numbers_of
from jmoe_kernels.paged_attention.types import LayerPages, NewTokens
from jmoe_kernels.paged_attention.write import write_pages
from jmoe_kernels.settings import Span

BLOCK = 128  # queries that attend together, and keys that a step of the loop reads
BLOCK_BYTES = 2 << 20  # fewer keys if they are more bytes than this: they should stay in a core's cache
MASK_VALUE = -1e30


def visible(query_BT: Int[Array, "B T"], key_BS: Int[Array, "B S"], span: Span) -> Bool[Array, "B T S"]:
    """Returns which keys a query attends to; a position of -1 is padding."""
    query, key = query_BT[:, :, None], key_BS[:, None, :]
    mask = (query >= key) & (key >= 0)
    return mask if span == Span() else mask & (key >= span.first(query))


def finite_rows(rows: Float[Array, "*B S d"]) -> tuple[Float[Array, "*B S d"], Bool[Array, "*B S"]]:
    """Returns ``rows`` with 0 for what is not finite, and which rows held such a number.

    A weight of 0 does not hide a value: 0 times NaN is NaN. So no product may meet values that some of its
    queries do not see and that other requests wrote. Queries that see such a row get NaN from ``taint``
    instead.
    """
    finite = jnp.isfinite(rows)
    return jnp.where(finite, rows, 0), ~finite.all(-1)


def taint(mask: Bool[Array, "*B T S"], broken: Bool[Array, "*B S"]) -> Bool[Array, "*B T"]:
    """Marks the queries that see a row which is not finite."""
    return (mask & broken[..., None, :]).any(-1)


def gather_pages(
    pages_PGSd: Shaped[Array, "P G S d"],
    ids_BN: Int[Array, "B N"],
    scales_PGS: Float[Array, "P G S"] | None = None,
) -> Float[Array, "B G N*S d"]:
    """Returns the rows of each sequence's pages ``ids_BN`` in order, in the model's dtype; quantised ones in
    float32.

    Heads are gathered as pages of their own, so that the result needs no transposition. The last two axes
    stay apart: a TPU lays them out in tiles, and would copy the pool to join them. Those of scales are heads
    and rows, so they are gathered by page.
    """
    _, g, size, d = pages_PGSd.shape
    b, n = ids_BN.shape
    ids_BGN = ids_BN[:, None] * g + jnp.arange(g, dtype=jnp.int32)[None, :, None]
    rows = pages_PGSd.reshape(-1, size, d).at[ids_BGN.reshape(-1)].get(mode="promise_in_bounds")
    rows = rows.reshape(b, g, n * size, d)
    if scales_PGS is None:
        return numbers_of(rows, None)
    scales_BNGS = scales_PGS.at[ids_BN].get(mode="promise_in_bounds")
    return numbers_of(rows, scales_BNGS.swapaxes(1, 2).reshape(b, g, n * size))


def write_tokens(new: NewTokens, pages: LayerPages) -> LayerPages:
    """Returns the pages with the new rows."""
    return write_pages(new, pages)


def attend(
    new: NewTokens, pages: LayerPages, span: Span, sinks_H: Float[Array, " H"] | None
) -> Float[Array, "B T H d"]:
    """Returns causal attention to those keys of the sequences' pages that each query's span reaches.

    The loop goes from the first key that one of its queries sees to the largest of their positions, so one
    compiled shape serves every context length. Many queries are split into blocks that each have their own
    ends: queries of the block are of one row, or of several short rows.
    """
    q_BTHd, positions_BT, table_BM = new.q_BTHd, new.positions_BT, new.table_BM
    b, t = positions_BT.shape
    parts = [slice(start, min(start + BLOCK, t)) for start in range(0, t, BLOCK)]
    rows = b if t == 1 else max(1, BLOCK // t)

    def attend_rows(inputs: tuple[Array, Array, Array]) -> Array:
        q, positions, table = inputs
        outputs = [_attend_block(q[:, p], pages, positions[:, p], table, span, sinks_H) for p in parts]
        return jnp.concatenate(outputs, axis=1)

    if rows >= b:
        return attend_rows((q_BTHd, positions_BT, table_BM))
    padding = [(0, -b % rows)]
    tables = jnp.pad(table_BM, [*padding, (0, 0)])
    positions = jnp.pad(positions_BT, [*padding, (0, 0)], constant_values=-1)
    groups = jnp.pad(q_BTHd, [*padding, (0, 0), (0, 0), (0, 0)]), positions, tables
    out = lax.map(attend_rows, jax.tree.map(lambda a: a.reshape(-1, rows, *a.shape[1:]), groups))
    return out.reshape(-1, *q_BTHd.shape[1:])[:b]


def _attend_block(
    q_BTHd: Array,
    pages: LayerPages,
    positions_BT: Array,
    table_BM: Array,
    span: Span,
    sinks_H: Array | None,
) -> Array:
    k_PGSd, v_PGSd = pages.kv[0], pages.kv[-1]  # latent pages are both
    k_PGS, v_PGS = (None, None) if pages.scales is None else (pages.scales[0], pages.scales[-1])
    (b, t, h, d), (_, g, size, _) = q_BTHd.shape, k_PGSd.shape
    most_pages = BLOCK_BYTES // (b * g * size * d * 4)
    per_block = max(1, min(most_pages, BLOCK // size, table_BM.shape[1]))
    keys = per_block * size
    table = jnp.pad(table_BM, ((0, 0), (0, -table_BM.shape[1] % per_block)))
    q = (q_BTHd * d**-0.5).reshape(b, t, g, h // g, d).transpose(0, 2, 3, 1, 4).reshape(b, g, -1, d)

    def block(j: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        top, total, acc, tainted_BGT = carry
        ids = lax.dynamic_slice_in_dim(table, j * per_block, per_block, axis=1)
        key_BS = jnp.broadcast_to(j * keys + jnp.arange(keys, dtype=jnp.int32)[None], (b, keys))
        visible_BTS = visible(positions_BT, key_BS, span)
        mask = jnp.tile(visible_BTS[:, None], (1, 1, h // g, 1))
        scores = jnp.where(mask, dot("bgqd,bgsd->bgqs", q, gather_pages(k_PGSd, ids, k_PGS)), MASK_VALUE)
        new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
        share = jnp.where(mask, jnp.exp(scores - new_top), 0.0)
        decay = jnp.exp(top - new_top)
        values = gather_pages(v_PGSd, ids, v_PGS)
        if t == 1:  # there is one query, so a value that it does not see is used by nobody
            values = jnp.where(visible_BTS.swapaxes(1, 2)[:, None], values, 0)
        else:
            values, broken_BGS = finite_rows(values)
            tainted_BGT = tainted_BGT | taint(visible_BTS[:, None], broken_BGS)
        acc = acc * decay + dot("bgqs,bgsd->bgqd", share, values)
        return new_top, total * decay + share.sum(-1, keepdims=True), acc, tainted_BGT

    rows = (b, g, (h // g) * t)
    top, total = jnp.full((*rows, 1), MASK_VALUE), jnp.zeros((*rows, 1))
    if sinks_H is not None:  # a key that comes before all others and has no value
        sinks = sinks_H.astype(jnp.float32).reshape(1, g, h // g, 1, 1)
        top, total = jnp.broadcast_to(sinks, (b, g, h // g, t, 1)).reshape(*rows, 1), total + 1
    real_BT = jnp.where(positions_BT < 0, jnp.max(positions_BT), positions_BT)
    first = jnp.maximum(jnp.min(span.first(real_BT)), 0) // keys
    start = top, total, jnp.zeros((*rows, d)), jnp.zeros((b, g, t), bool)
    _, total, acc, tainted_BGT = lax.fori_loop(first, jnp.max(positions_BT) // keys + 1, block, start)
    # The share of the top itself is 1: only padding, which sees no key, has less.
    out = (acc / jnp.maximum(total, 1.0)).reshape(b, g, h // g, t, d)
    out = out if t == 1 else jnp.where(tainted_BGT[:, :, None, :, None], jnp.nan, out)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, h, d)
