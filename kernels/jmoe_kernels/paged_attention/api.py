"""``paged_attention``: one entry for every implementation; a named one raises where it cannot run."""

from typing import Any, Literal, get_args

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jmoe_kernels import cpu
from jmoe_kernels.paged_attention import gpu, tpu
from jmoe_kernels.paged_attention.types import Heads, LayerPages, NewTokens, Span
from jmoe_kernels.paged_attention.xla import paged_attention_xla

Attention = Literal["xla", "cpu", "tpu", "gpu"]


def supports(implementation: str, platform: str, dtype: Any, heads: Heads) -> str | None:
    """Why ``implementation`` cannot run on ``platform``, or None if it can.

    dtype: of the keys and values. heads: of one rank.
    """
    if implementation not in get_args(Attention):
        return f"paged attention {implementation!r} is unknown; known: {', '.join(get_args(Attention))}"
    if implementation == "xla":
        return None
    if implementation != platform:
        here = f"needs a {implementation}, this is a {platform}"
        return f"paged attention {implementation!r} {here}; 'xla' can run"
    if implementation == "cpu":
        library = cpu.get_library()
        return f"paged attention 'cpu': {library}; 'xla' can run" if isinstance(library, str) else None
    limits = {"tpu": tpu.supports, "gpu": gpu.supports}[implementation]
    reason = limits(heads, jnp.dtype(dtype))
    return reason and f"paged attention {implementation!r}: {reason}; 'xla' can run"


def pick(platform: str, dtype: Any, heads: Heads) -> tuple[Attention, str]:
    """The implementation for ``platform``, and why."""
    own: Attention = platform if platform in ("cpu", "tpu", "gpu") else "xla"  # pyright: ignore[reportAssignmentType]
    if (reason := supports(own, platform, dtype, heads)) is not None:
        return "xla", "portable XLA: " + reason
    kept = {
        "cpu": "the C++ kernel",
        "tpu": "jax's ragged paged attention",
        "gpu": "jax's Pallas paged attention in decode, cuDNN in prefill",
    }
    return own, kept.get(own, "portable XLA")


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
    """Writes the new keys and values, then attends: each query to its sequence up to its own position.

    span: which keys a query sees. sinks_H: a logit of each query head that joins the softmax's denominator
    and has no value (gpt-oss). Returns float32 outputs ``[B, T, H, d]``, unspecified but finite at padding,
    and the updated pages.
    """
    if implementation == "xla":
        return paged_attention_xla(new, pages, span, sinks_H)
    if implementation == "cpu":
        return _paged_attention_cpu(new, pages, span, sinks_H)
    (_, _, query, dim), kv = new.q_BTHd.shape, new.k_BTGd.shape[2]
    heads = Heads(query, kv, dim, span, sinks_H is not None, dim if new.v_BTGd is None else None)
    if (reason := {"tpu": tpu.lacks, "gpu": gpu.lacks}[implementation](heads)) is not None:
        raise ValueError(f"paged attention {implementation!r}: {reason}; 'xla' can run")
    if implementation == "tpu":
        return tpu.paged_attention_tpu(new, pages, span.window)
    return gpu.paged_attention_gpu(new, pages)


def _paged_attention_cpu(
    new: NewTokens, pages: LayerPages, span: Span, sinks_H: Array | None
) -> tuple[Array, LayerPages]:
    at = new.positions_BT, new.table_BM
    if new.v_BTGd is None:
        [kv_PGSd] = pages.kv
        kept = (cpu.write_latent(kv_PGSd, new.k_BTGd, *at),)
    else:
        k_PGSd, v_PGSd = pages.kv
        kept = cpu.write_pages(k_PGSd, v_PGSd, new.k_BTGd, new.v_BTGd, *at)
    out = cpu.attend(new.q_BTHd, kept[0], kept[-1], *at, span.window, span.chunk, sinks_H)
    return out, LayerPages(kept)
