"""Binning on GPU: one thread block, by Pallas' Triton lowering.

This project's other GPU kernels use Mosaic GPU. This one consists of reductions over small tiles and of
scattered stores, for which Triton finds layouts of registers and barriers by itself. jax 0.11 calls the
Triton lowering deprecated, and still has it; without it, "xla" remains.
"""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Bool, Float

from jmoe_kernels.binning import fused
from jmoe_kernels.binning.body import iota
from jmoe_kernels.binning.plan import Lowering, Ref, cost
from jmoe_kernels.binning.types import Binned, Rule

LANES = 16  # the least side of a product in Triton
MOST_EXPERTS = 512
MOST_TOKENS = 512  # one thread block goes through them tile by tile, while the others of the device idle
WARPS = 8
PAIRS = 2048  # eight per thread: with more, registers spill


def most_tokens(experts: int, k: int) -> int:
    """Returns the largest number of tokens that a call takes."""
    return MOST_TOKENS


def limit(experts: int, rule: Rule) -> str | None:
    """Returns why the kernel cannot run, with the limit that is exceeded, or None if it can."""
    if not 2 <= experts <= MOST_EXPERTS:
        return f"{experts} experts; the kernel takes 2 to {MOST_EXPERTS}"
    return None if 1 <= rule.k <= experts else f"k = {rule.k}; it must be between 1 and the {experts} experts"


def _scatter(ref: Ref, first: Array | int, value_TE: Array, place_TE: Array, k: int) -> None:
    row_TE = first + iota(place_TE.shape, 0)
    triton.store(ref.at[row_TE, place_TE], value_TE, mask=place_TE < k)


def _order(ref: Ref, first: Array | int, slot_TE: Array, place_TE: Array, k: int) -> None:
    flat_TE = (first + iota(place_TE.shape, 0)) * k + place_TE
    chosen_TE = place_TE < k
    slot_TE = jnp.where(chosen_TE, slot_TE, ref.shape[1] - 1)
    triton.store(ref.at[jnp.zeros_like(slot_TE), slot_TE], flat_TE, mask=chosen_TE)


def bin_experts(
    logits_TE: Float[Array, "T E"],
    valid_T: Bool[Array, " T"],
    lossy_T: Bool[Array, " T"],
    rule: Rule,
    *,
    renormalize: bool,
    interpret: bool = False,
    total: Callable[[Array], Array] | None = None,
) -> Binned:
    """See ``api.bin_experts``."""
    t, experts = logits_TE.shape
    call = partial(
        pl.pallas_call,
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
        cost_estimate=cost(t, experts, rule.k),
        interpret=interpret,
    )
    # In the interpreter a store also reads where its mask is off, so it needs a spare element for that.
    barrier = (lambda: None) if interpret else triton.debug_barrier
    lowering = Lowering(call, barrier, LANES, PAIRS, 1, _scatter, _order)
    return fused.bin_experts(
        logits_TE, valid_T, lossy_T, rule, lowering, renormalize=renormalize, total=total
    )
