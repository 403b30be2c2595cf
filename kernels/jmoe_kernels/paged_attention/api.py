"""``paged_attention``: one entry for every implementation; it raises if the named one cannot run."""

from collections.abc import Sequence
from typing import Any, get_args

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jmoe_kernels import cpu
from jmoe_kernels.backends import AttentionKernel, first_supported, get_backend, home_of
from jmoe_kernels.paged_attention import gpu, tpu
from jmoe_kernels.paged_attention.types import Heads, LayerPages, NewTokens, Span
from jmoe_kernels.paged_attention.write import write
from jmoe_kernels.paged_attention.xla import attend

LIMITED = {"tpu": tpu, "gpu": gpu}  # jax's kernels, which do not have all that a layer may need
PRAISE = {
    "cpu": "the C++ kernel",
    "tpu": "jax's ragged paged attention",
    "gpu": "jax's Pallas paged attention in decode, cuDNN in prefill",
}


def supports(implementation: str, platform: str, dtype: Any, heads: Heads) -> str | None:
    """Returns why ``implementation`` cannot run on ``platform``, or None if it can.

    dtype: dtype of the keys and values.
    heads: heads of one rank.
    """
    if implementation not in get_args(AttentionKernel):
        return f"paged attention {implementation!r} is unknown; known: {', '.join(get_args(AttentionKernel))}"
    if (home := home_of(implementation)) is None:
        return None
    if home != platform:
        mismatch = f"needs a {home}, this is a {platform}"
        return f"paged attention {implementation!r} {mismatch}; 'xla' can run"
    if implementation in LIMITED:
        reason = LIMITED[implementation].supports(heads, jnp.dtype(dtype))
    else:
        reason = library if isinstance(library := cpu.get_library(), str) else None
    return reason and f"paged attention {implementation!r}: {reason}; 'xla' can run"


def pick(platform: str, dtype: Any, heads: Heads) -> tuple[AttentionKernel, str]:
    """Returns the implementation for ``platform``, and the reason."""
    return first_supported(
        get_backend(platform).attention,
        lambda name: supports(name, platform, dtype, heads),
        PRAISE.__getitem__,
    )


def page_shapes(
    implementation: AttentionKernel, pages: int, kv_heads: int, size: int, dim: int, latent: bool = False
) -> tuple[tuple[int, ...], ...]:
    """Returns the shapes of the arrays of a layer's ``LayerPages``.

    pages: number of pages.
    kv_heads: number of key-value heads.
    size: number of rows of a page.
    dim: dimension of a head.
    latent: whether rows are keys and values at once.
    """
    if latent:
        return ((pages, kv_heads, size, dim),)
    if implementation == "tpu":
        return ((pages, size, 2 * kv_heads, dim),)
    return ((pages, kv_heads, size, dim),) * 2


def heads_axis(implementation: AttentionKernel) -> int:
    """Returns the axis of those arrays on which the heads lie; pages are always the first axis."""
    return 2 if implementation == "tpu" else 1


def paged_attention(
    implementation: AttentionKernel,
    new: NewTokens,
    pages: LayerPages,
    span: Span = Span(),
    sinks_H: Float[Array, " H"] | None = None,
) -> tuple[Float[Array, "B T H d"], LayerPages]:
    """Writes the new keys and values, then attends to them and to what the pages held: see ``attend_all``."""
    [out], pages = attend_all(implementation, [new], pages, span, sinks_H)
    return out, pages


def attend_all(
    implementation: AttentionKernel,
    pieces: Sequence[NewTokens],
    pages: LayerPages,
    span: Span = Span(),
    sinks_H: Float[Array, " H"] | None = None,
) -> tuple[list[Float[Array, "B T H d"]], LayerPages]:
    """Writes the new keys and values of every piece, then each query attends up to its own position.

    All writes come before any read. A read between two writes would keep the pool as it was between them, and
    so cost a copy of it.

    span: which keys a query sees.
    sinks_H: logit of each query head that joins the softmax's denominator and has no value (gpt-oss).

    Returns the float32 outputs ``[B, T, H, d]`` of every piece, zero at padding, and the updated pages.
    Raises ValueError if the named kernel lacks what the layer needs, or (except "cpu", which writes any run)
    if a run of several tokens is not a multiple of the page size.

    A number that is not finite reaches only the queries that see its key. A sequence's outputs do not depend
    on other sequences' pages, on page 0, or on rows after the sequence's length. They depend neither on keys
    before a query's window nor on those after the query, except in jax's kernel on TPU, where an earlier
    query of the same sequence may become NaN too.
    """
    for new in pieces:
        _check(implementation, new, span, sinks_H)
        pages = _write(implementation, new, pages)
    return [_attend(implementation, new, pages, span, sinks_H) for new in pieces], pages


def _check(implementation: AttentionKernel, new: NewTokens, span: Span, sinks_H: Array | None) -> None:
    """Raises ValueError if a named kernel lacks what the layer needs."""
    if implementation not in LIMITED:
        return
    (_, _, query, dim), kv = new.q_BTHd.shape, new.k_BTGd.shape[2]
    heads = Heads(query, kv, dim, span, sinks_H is not None, dim if new.v_BTGd is None else None)
    if (reason := LIMITED[implementation].lacks(heads)) is not None:
        raise ValueError(f"paged attention {implementation!r}: {reason}; 'xla' can run")


def _write(implementation: AttentionKernel, new: NewTokens, pages: LayerPages) -> LayerPages:
    address = new.positions_BT, new.table_BM
    if implementation in LIMITED:
        return LIMITED[implementation].write_tokens(new, pages)
    if new.v_BTGd is None:
        [kv_PGSd] = pages.kv
        put = cpu.write_latent if implementation == "cpu" else write
        return LayerPages((put(kv_PGSd, new.k_BTGd, *address),))
    k_PGSd, v_PGSd = pages.kv
    if implementation == "cpu":
        return LayerPages(cpu.write_pages(k_PGSd, v_PGSd, new.k_BTGd, new.v_BTGd, *address))
    return LayerPages((write(k_PGSd, new.k_BTGd, *address), write(v_PGSd, new.v_BTGd, *address)))


def _attend(
    implementation: AttentionKernel, new: NewTokens, pages: LayerPages, span: Span, sinks_H: Array | None
) -> Array:
    kv, address = (pages.kv[0], pages.kv[-1]), (new.positions_BT, new.table_BM)
    if implementation == "tpu":
        return tpu.attend(new, pages, span.window)
    if implementation == "gpu":
        return gpu.attend(new, pages)
    if implementation == "cpu":
        return cpu.attend(new.q_BTHd, *kv, *address, (span.window, span.chunk), sinks_H)
    return attend(new.q_BTHd, *kv, *address, span, sinks_H)
