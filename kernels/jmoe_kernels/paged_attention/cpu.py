"""Paged attention by the C++ kernel (``cpu/src/attention.cc``), which has all that a layer may need."""

from typing import Any

from jax import Array
from jaxtyping import Float

from jmoe_kernels import cpu
from jmoe_kernels.paged_attention.types import LayerPages, NewTokens
from jmoe_kernels.settings import Span


def write_tokens(new: NewTokens, pages: LayerPages) -> LayerPages:
    """Returns the pages with the new rows; a run may have any length."""
    address, kv = (new.positions_BT, new.table_BM), _with_scales(pages)
    written: tuple[Any, ...]
    if new.v_BTGd is None:
        written = (cpu.write_latent(kv[0], new.k_BTGd, *address),)
    else:
        written = cpu.write_pages(kv[0], kv[1], new.k_BTGd, new.v_BTGd, *address)
    if pages.scales is None:
        return LayerPages(written)
    codes, scales = zip(*written, strict=True)
    return LayerPages(codes, scales)


def attend(
    new: NewTokens, pages: LayerPages, span: Span, sinks_H: Float[Array, " H"] | None
) -> Float[Array, "B T H d"]:
    """Returns the output of every query over pages that hold the new rows, zero for padding."""
    kv = _with_scales(pages)
    limits = span.window, span.chunk
    return cpu.attend(new.q_BTHd, kv[0], kv[-1], new.positions_BT, new.table_BM, limits, sinks_H)


def _with_scales(pages: LayerPages) -> tuple[Any, ...]:
    """Returns the arrays of pages, each with its scales if it has any. Latent pages are one."""
    return pages.kv if pages.scales is None else tuple(zip(pages.kv, pages.scales, strict=True))
