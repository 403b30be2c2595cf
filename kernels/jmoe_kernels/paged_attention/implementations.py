"""The implementations of paged attention: one record each, which ``api`` reads.

A new one needs its name in ``AttentionKernel``, its file in this folder, and its record here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from jmoe_kernels import cpu
from jmoe_kernels.backends import AttentionKernel
from jmoe_kernels.paged_attention import cpu as cpu_attention
from jmoe_kernels.paged_attention import jax_gpu, jax_tpu, xla
from jmoe_kernels.paged_attention.types import APART, JOINED, Heads, LayerPages, NewTokens, PageLayout
from jmoe_kernels.settings import Span


@dataclass(frozen=True)
class Implementation:
    """One way to compute paged attention. The defaults hold for one that runs anywhere, for all heads.

    attend: function of the tokens, the pages with their rows, the span and the sinks that returns the output
        of every query.
    write: function of the tokens and the pages that returns the pages with the tokens' rows.
    layout: layout of pages that are not latent.
    has_scales: whether quantised rows have scales of their own.
    why_missing: function that returns why this machine cannot run it, or None if it can.
    limit: function (heads, dtype) that returns the limit that heads of one rank exceed, or None.
    lacks: function (heads) that returns what the heads need and it does not have, whatever their sizes, or
        None; ``limit`` calls it too.
    describe: function that returns what it is, in a few words for a person.
    """

    attend: Callable[[NewTokens, LayerPages, Span, Array | None], Array]
    write: Callable[[NewTokens, LayerPages], LayerPages]
    layout: PageLayout = APART
    has_scales: bool = True
    why_missing: Callable[[], str | None] = lambda: None
    limit: Callable[[Heads, jnp.dtype], str | None] = lambda heads, dtype: None
    lacks: Callable[[Heads], str | None] = lambda heads: None
    describe: Callable[[], str] = lambda: "portable XLA"


IMPLEMENTATIONS: dict[AttentionKernel, Implementation] = {
    "xla": Implementation(xla.attend, xla.write_tokens),
    "cpu": Implementation(
        cpu_attention.attend,
        cpu_attention.write_tokens,
        why_missing=cpu.why_missing,
        describe=lambda: "the C++ kernel",
    ),
    "tpu": Implementation(
        lambda new, pages, span, sinks_H: jax_tpu.attend(new, pages, span.window),
        jax_tpu.write_tokens,
        layout=JOINED,
        has_scales=False,
        limit=jax_tpu.limit,
        lacks=jax_tpu.lacks,
        describe=lambda: "jax's ragged paged attention",
    ),
    "gpu": Implementation(
        lambda new, pages, span, sinks_H: jax_gpu.attend(new, pages),
        jax_gpu.write_tokens,
        limit=jax_gpu.limit,
        lacks=jax_gpu.lacks,
        describe=lambda: "jax's Pallas paged attention in decode, cuDNN in prefill",
    ),
}
