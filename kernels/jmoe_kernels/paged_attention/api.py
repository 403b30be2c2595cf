"""``attend_all``: one entry for every implementation; it raises if the named one cannot run."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jmoe_kernels.backends import AttentionKernel, first_supported, get_backend, home_of
from jmoe_kernels.paged_attention.implementations import IMPLEMENTATIONS
from jmoe_kernels.paged_attention.types import LATENT, Heads, LayerPages, NewTokens
from jmoe_kernels.settings import Span


def why_not(implementation: str, platform: str, dtype: Any, heads: Heads) -> str | None:
    """Returns why ``implementation`` cannot run on ``platform``, or None if it can.

    dtype: dtype of the keys and values before they are quantised.
    heads: heads of one rank.
    """
    if implementation not in IMPLEMENTATIONS:
        return f"paged attention {implementation!r} is unknown; known: {', '.join(IMPLEMENTATIONS)}"
    home = home_of(implementation) or platform
    if home != platform:
        mismatch = f"needs a {home}, this is a {platform}"
        return f"paged attention {implementation!r} {mismatch}; 'xla' can run"
    record = IMPLEMENTATIONS[implementation]
    reason = record.why_missing() or record.limit(heads, jnp.dtype(dtype))
    return reason and f"paged attention {implementation!r}: {reason}; 'xla' can run"


def pick(platform: str, dtype: Any, heads: Iterable[Heads]) -> tuple[AttentionKernel, str]:
    """Returns the implementation for ``platform``, and the reason.

    heads: heads of every layer; one implementation runs all of them.
    """

    def refusal(name: AttentionKernel) -> str | None:
        reasons = (why_not(name, platform, dtype, each) for each in heads)
        return next((reason for reason in reasons if reason is not None), None)

    return first_supported(
        get_backend(platform).attention,
        refusal,
        lambda name: IMPLEMENTATIONS[name].describe(),
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
    layout = LATENT if latent else IMPLEMENTATIONS[implementation].layout
    return layout.shapes(pages, kv_heads, size, dim)


def has_scales(implementation: AttentionKernel) -> bool:
    """Returns whether quantised pages have arrays of scales, whose shapes are those of the pages without the
    last axis."""
    return IMPLEMENTATIONS[implementation].has_scales


def heads_axis(implementation: AttentionKernel) -> int:
    """Returns the axis of those arrays on which the heads lie; pages are always the first axis."""
    return IMPLEMENTATIONS[implementation].layout.heads_axis


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
    record = IMPLEMENTATIONS[implementation]
    for new in pieces:
        _check(implementation, new, pages, span, sinks_H)
        pages = record.write(new, pages)
    return [record.attend(new, pages, span, sinks_H) for new in pieces], pages


def _check(
    implementation: AttentionKernel, new: NewTokens, pages: LayerPages, span: Span, sinks_H: Array | None
) -> None:
    """Raises ValueError if a named kernel lacks what the layer needs."""
    (_, _, query, dim), kv = new.q_BTHd.shape, new.k_BTGd.shape[2]
    value_dim = dim if new.v_BTGd is None else None
    heads = Heads(query, kv, dim, span, sinks_H is not None, value_dim, pages.code)
    if (reason := IMPLEMENTATIONS[implementation].lacks(heads)) is not None:
        raise ValueError(f"paged attention {implementation!r}: {reason}; 'xla' can run")
