"""``paged_attention``: one entry for every implementation; a named one raises where it cannot run."""

from collections.abc import Sequence
from typing import Any, get_args

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jmoe_kernels import cpu
from jmoe_kernels.backends import Attention, first_supported, get_backend, home_of
from jmoe_kernels.paged_attention import gpu, tpu
from jmoe_kernels.paged_attention.types import Heads, LayerPages, NewTokens, Span
from jmoe_kernels.paged_attention.write import write
from jmoe_kernels.paged_attention.xla import attend

LIMITED = {"tpu": tpu, "gpu": gpu}  # jax's kernels, which do not have all that a layer may ask for
PRAISE = {
    "cpu": "the C++ kernel",
    "tpu": "jax's ragged paged attention",
    "gpu": "jax's Pallas paged attention in decode, cuDNN in prefill",
}


def supports(implementation: str, platform: str, dtype: Any, heads: Heads) -> str | None:
    """Why ``implementation`` cannot run on ``platform``, or None if it can.

    dtype: of the keys and values. heads: of one rank.
    """
    if implementation not in get_args(Attention):
        return f"paged attention {implementation!r} is unknown; known: {', '.join(get_args(Attention))}"
    if (needed := home_of(implementation)) is None:
        return None
    if needed != platform:
        here = f"needs a {needed}, this is a {platform}"
        return f"paged attention {implementation!r} {here}; 'xla' can run"
    if implementation in LIMITED:
        reason = LIMITED[implementation].supports(heads, jnp.dtype(dtype))
    else:
        reason = library if isinstance(library := cpu.get_library(), str) else None
    return reason and f"paged attention {implementation!r}: {reason}; 'xla' can run"


def pick(platform: str, dtype: Any, heads: Heads) -> tuple[Attention, str]:
    """The implementation for ``platform``, and why."""
    return first_supported(
        get_backend(platform).attention,
        lambda name: supports(name, platform, dtype, heads),
        PRAISE.__getitem__,
    )


def page_shapes(
    implementation: Attention, pages: int, kv_heads: int, size: int, dim: int, latent: bool = False
) -> tuple[tuple[int, ...], ...]:
    """Shapes of the arrays of a layer's ``LayerPages``."""
    if latent:
        return ((pages, kv_heads, size, dim),)
    if implementation == "tpu":
        return ((pages, size, 2 * kv_heads, dim),)
    return ((pages, kv_heads, size, dim),) * 2


def heads_axis(implementation: Attention) -> int:
    """Which axis of those arrays the heads lie on; pages are always the first."""
    return 2 if implementation == "tpu" else 1


def paged_attention(
    implementation: Attention,
    new: NewTokens,
    pages: LayerPages,
    span: Span = Span(),
    sinks_H: Float[Array, " H"] | None = None,
) -> tuple[Float[Array, "B T H d"], LayerPages]:
    """Writes the new keys and values, then attends to them and to what the pages held: see ``attend_all``."""
    [out], pages = attend_all(implementation, [new], pages, span, sinks_H)
    return out, pages


def attend_all(
    implementation: Attention,
    pieces: Sequence[NewTokens],
    pages: LayerPages,
    span: Span = Span(),
    sinks_H: Float[Array, " H"] | None = None,
) -> tuple[list[Float[Array, "B T H d"]], LayerPages]:
    """Writes the new keys and values of every piece, then attends: each query to its sequence up to its own
    position.

    All writes come before any read. A read between two writes would keep the pool as it was between them,
    and so cost a copy of it.

    span: which keys a query sees. sinks_H: a logit of each query head that joins the softmax's denominator
    and has no value (gpt-oss). Returns float32 outputs ``[B, T, H, d]`` of every piece, zero at padding, and
    the updated pages.

    A number that is not finite reaches only the queries that see its key: a sequence's outputs do not depend
    on what lies in pages of others, in page 0, behind its length or, but for jax's kernel on TPU, before its
    windows and behind a query. There an earlier query of the same sequence may become NaN too.
    """
    for new in pieces:
        _check(implementation, new, span, sinks_H)
        pages = _write(implementation, new, pages)
    return [_attend(implementation, new, pages, span, sinks_H) for new in pieces], pages


def _check(implementation: Attention, new: NewTokens, span: Span, sinks_H: Array | None) -> None:
    """Raises ValueError where a named kernel has not what the layer asks for."""
    if implementation not in LIMITED:
        return
    (_, _, query, dim), kv = new.q_BTHd.shape, new.k_BTGd.shape[2]
    heads = Heads(query, kv, dim, span, sinks_H is not None, dim if new.v_BTGd is None else None)
    if (reason := LIMITED[implementation].lacks(heads)) is not None:
        raise ValueError(f"paged attention {implementation!r}: {reason}; 'xla' can run")


def _write(implementation: Attention, new: NewTokens, pages: LayerPages) -> LayerPages:
    at = new.positions_BT, new.table_BM
    if implementation in LIMITED:
        return LIMITED[implementation].write_tokens(new, pages)
    if new.v_BTGd is None:
        [kv_PGSd] = pages.kv
        put = cpu.write_latent if implementation == "cpu" else write
        return LayerPages((put(kv_PGSd, new.k_BTGd, *at),))
    k_PGSd, v_PGSd = pages.kv
    if implementation == "cpu":
        return LayerPages(cpu.write_pages(k_PGSd, v_PGSd, new.k_BTGd, new.v_BTGd, *at))
    return LayerPages((write(k_PGSd, new.k_BTGd, *at), write(v_PGSd, new.v_BTGd, *at)))


def _attend(
    implementation: Attention, new: NewTokens, pages: LayerPages, span: Span, sinks_H: Array | None
) -> Array:
    kv, at = (pages.kv[0], pages.kv[-1]), (new.positions_BT, new.table_BM)
    if implementation == "tpu":
        return tpu.attend(new, pages, span.window)
    if implementation == "gpu":
        return gpu.attend(new, pages)
    if implementation == "cpu":
        return cpu.attend(new.q_BTHd, *kv, *at, span.window, span.chunk, sinks_H)
    return attend(new.q_BTHd, *kv, *at, span, sinks_H)
