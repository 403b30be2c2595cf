"""Paged attention of one run of tokens per sequence, as the tests of its implementations call it."""

from jax import Array
from jmoe_kernels.backends import AttentionKernel
from jmoe_kernels.paged_attention import LayerPages, NewTokens, Span, attend_all, jax_gpu


def paged_attention(
    implementation: AttentionKernel,
    new: NewTokens,
    pages: LayerPages,
    span: Span = Span(),
    sinks_H: Array | None = None,
) -> tuple[Array, LayerPages]:
    """Writes the new keys and values, then attends to them and to what the pages held."""
    [out], pages = attend_all(implementation, [new], pages, span, sinks_H)
    return out, pages


def interpreted_gpu(new: NewTokens, pages: LayerPages) -> tuple[Array, LayerPages]:
    """Does the same by the implementation for GPUs, without one: its decode kernel is interpreted."""
    pages = jax_gpu.write_tokens(new, pages)
    return jax_gpu.attend(new, pages, interpret=True), pages
