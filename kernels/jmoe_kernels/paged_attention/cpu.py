"""Paged attention by the C++ kernel (``cpu/src/attention.cc``), which has all that a layer may need."""

from jax import Array
from jaxtyping import Float

from jmoe_kernels import cpu
from jmoe_kernels.paged_attention.types import LayerPages, NewTokens
from jmoe_kernels.settings import Span


def write_tokens(new: NewTokens, pages: LayerPages) -> LayerPages:
    """Returns the pages with the new rows; a run may have any length."""
    address = new.positions_BT, new.table_BM
    if new.v_BTGd is None:
        [kv_PGSd] = pages.kv
        return LayerPages((cpu.write_latent(kv_PGSd, new.k_BTGd, *address),))
    k_PGSd, v_PGSd = pages.kv
    return LayerPages(cpu.write_pages(k_PGSd, v_PGSd, new.k_BTGd, new.v_BTGd, *address))


def attend(
    new: NewTokens, pages: LayerPages, span: Span, sinks_H: Float[Array, " H"] | None
) -> Float[Array, "B T H d"]:
    """Returns the output of every query over pages that hold the new rows, zero for padding."""
    k_PGSd, v_PGSd = pages.kv[0], pages.kv[-1]  # latent pages are both
    limits = span.window, span.chunk
    return cpu.attend(new.q_BTHd, k_PGSd, v_PGSd, new.positions_BT, new.table_BM, limits, sinks_H)
