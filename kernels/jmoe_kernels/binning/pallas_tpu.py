"""Binning on TPU (Pallas, Mosaic): one kernel that keeps everything in VMEM."""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Bool, Float

from jmoe_kernels.binning import fused
from jmoe_kernels.binning.body import fold_axis, iota
from jmoe_kernels.binning.plan import TILE, Lowering, Ref, cost
from jmoe_kernels.binning.types import Binned, Rule

LANES = 128
MOST_EXPERTS = 1024
MOST_LOGITS = 1 << 19  # three arrays of this size, and the outputs by token, fit the limit below
MOST_ASSIGNMENTS = 1 << 13  # the order is written by comparing each assignment with each slot
VMEM_LIMIT = 48 << 20
UNROLLED = 8  # rounds that do not wait for each other overlap when they are unrolled


def most_tokens(experts: int, k: int) -> int:
    """Returns the largest number of tokens that a call takes."""
    return min(MOST_LOGITS // experts, MOST_ASSIGNMENTS // k)


def limit(experts: int, rule: Rule) -> str | None:
    """Returns why the kernel cannot run, with the limit that is exceeded, or None if it can."""
    if not 2 <= experts <= MOST_EXPERTS:
        return f"{experts} experts; the kernel takes 2 to {MOST_EXPERTS}"
    return None if 1 <= rule.k <= experts else f"k = {rule.k}; it must be between 1 and the {experts} experts"


def _scatter(ref: Ref, first: Array | int, value_TE: Array, place_TE: Array, k: int) -> None:
    t, float_TE = place_TE.shape[0], value_TE.astype(jnp.float32)
    lane_TK = iota((t, k), 1)

    def put(j: Array, tile_TK: Array) -> Array:
        value_T1 = fold_axis(jnp.sum, jnp.where(place_TE == j, float_TE, 0.0), 1)
        return jnp.where(lane_TK == j, value_T1, tile_TK)

    tile_TK = lax.fori_loop(0, k, put, jnp.zeros((t, k), jnp.float32), unroll=k <= UNROLLED)
    ref[pl.ds(first, t), :] = tile_TK.astype(value_TE.dtype)


def _order(ref: Ref, first: Array | int, slot_TE: Array, place_TE: Array, k: int) -> None:
    t, n = place_TE.shape[0], ref.shape[1]
    flat_T1 = (first + iota((t, 1), 0)) * k
    lane_TN, float_TE = iota((t, n), 1), slot_TE.astype(jnp.float32)

    def put(j: Array, order_1N: Array) -> Array:
        slot_T1 = fold_axis(jnp.sum, jnp.where(place_TE == j, float_TE, 0.0), 1).astype(jnp.int32)
        here_1N = fold_axis(jnp.max, jnp.where(lane_TN == slot_T1, flat_T1 + j, -1), 0)
        return jnp.where(here_1N < 0, order_1N, here_1N)

    ref[...] = lax.fori_loop(0, k, put, ref[...], unroll=k <= UNROLLED)


def bin_experts(
    logits_TE: Float[Array, "T E"],
    valid_T: Bool[Array, " T"],
    lossy_T: Bool[Array, " T"],
    rule: Rule,
    *,
    renormalize: bool,
    interpret: bool | pltpu.InterpretParams = False,
    total: Callable[[Array], Array] | None = None,
) -> Binned:
    """See ``api.bin_experts``."""
    t, experts = logits_TE.shape
    call = partial(
        pl.pallas_call,
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_LIMIT),
        cost_estimate=cost(t, experts, rule.k),
        interpret=interpret,
    )
    lowering = Lowering(call, lambda: None, LANES, TILE, 0, _scatter, _order)
    return fused.bin_experts(
        logits_TE, valid_T, lossy_T, rule, lowering, renormalize=renormalize, total=total
    )
