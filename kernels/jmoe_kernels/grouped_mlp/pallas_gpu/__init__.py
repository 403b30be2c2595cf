"""Grouped MLP for Hopper GPUs in Pallas Mosaic GPU: TMA loads and wgmma products.

The static shape chooses between two pairs of kernels: ``decode`` up to 64 rows per expert on average,
``prefill`` above (``blocks.bucket``). Both compute gate, up and the activation in one kernel, and down in a
second. Between the two, h stands in device memory, window by window (``blocks.windows``), rounded to
bfloat16. Quantised weights always take ``decode``, with wider windows for many rows, and are decoded in
registers (``factor``); their layout is "tiles". bfloat16 weights lie as in a checkpoint.

Its limits (``limit``): products are bfloat16, the inner and model dimensions are multiples of 64, and groups
are 16, 32, multiples of 64 or whole rows. Dimensions that 128 divides get the larger tiles and steps.

Axes: as in ``grouped_mlp``, and W windows, R rows of a window, G groups (the experts and the rows past the
last of them), P products of a kernel, O and I its output and input dimensions. A name that ends in ``_s`` is
in shared memory.
"""

from typing import get_args

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import BFloat16, Float, Int

from jmoe_kernels.grouped_mlp.pallas_gpu import decode, prefill
from jmoe_kernels.grouped_mlp.pallas_gpu.blocks import (
    ALIGN,
    SMEM_LIMIT,
    BlockSizes,
    choose_blocks,
    fit_blocks,
    windows,
)
from jmoe_kernels.grouped_mlp.pallas_gpu.factor import why_unrounded
from jmoe_kernels.grouped_mlp.types import ExpertWeights
from jmoe_kernels.quantised import Coding, Quantised, coding_of
from jmoe_kernels.settings import Activation, Activations

UNIT = (
    64  # the least weight tile and contraction step: M of wgmma, and 128 bytes of bfloat16 for TMA's swizzle
)
__all__ = ["BlockSizes", "grouped_mlp_pallas_gpu", "limit", "why_unrounded"]


def limit(weights: ExpertWeights, rows: int, activation: str) -> str | None:
    """Returns why the kernels cannot run on these static shapes and dtypes, or None if they can."""
    experts, inner, model = weights.dims
    for name, array in (("gate_up", weights.gate_up_E2FD), ("down", weights.down_EDF)):
        if jnp.dtype(array.dtype) != jnp.bfloat16:
            return f"weights must be bfloat16, {name} is {array.dtype}"
        if reason := _limit_of_coding(coding_of(array)):
            return f"{name} is quantised: {reason}"
    for name, size in (("inner", inner), ("model", model)):
        if size % UNIT or not size:
            return f"the {name} dimension must be a multiple of {UNIT}, got {size}"
    for name, array in (("gate_up", weights.gate_up_E2FD), ("down", weights.down_EDF)):
        if isinstance(array, Quantised) and array.layout != "tiles":
            return f"{name} is quantised in the layout {array.layout!r}; the kernels take 'tiles'"
    if rows < 1 or experts < 1:
        return f"needs at least 1 row and 1 expert, got {rows} and {experts}"
    if activation not in get_args(Activation):
        return f"activation {activation!r} is unknown; known: {', '.join(get_args(Activation))}"
    return None


def _limit_of_coding(coding: Coding | None) -> str | None:
    group = coding and coding.group
    if group is None or group % UNIT == 0 or group in (16, 32):
        return None
    return f"groups of {group} numbers; the kernels take 16, 32, multiples of {UNIT} and whole rows"


def grouped_mlp_pallas_gpu(
    x_ND: BFloat16[Array, "N D"],
    weights: ExpertWeights,
    group_sizes_E: Int[Array, " E"],
    *,
    activation: Activation = "silu",
    interpret: bool = False,
    blocks: BlockSizes | None = None,
    activations: Activations = "auto",
) -> Float[Array, "N D"]:
    """Computes the gated MLP of each row's expert in float32; rows past the last group are zero.

    x_ND: rows sorted by expert.
    group_sizes_E: number of rows of each expert, summing to at most N; they are data, and experts without
        rows are not read.
    interpret: whether to run in the interpreter on CPU.
    blocks: block sizes; None takes the table's.
    activations: what rows are rounded to where codes are int8 or become it.
    Raises ValueError naming the limit that the shapes, dtypes or blocks exceed.
    """
    rows, model = x_ND.shape
    reason = limit(weights, rows, activation)
    if reason is None and x_ND.dtype != jnp.bfloat16:
        reason = f"x must be bfloat16, got {x_ND.dtype}"
    if reason is not None:
        raise ValueError(f"grouped_mlp_pallas_gpu: {reason}")
    if blocks is None:
        kind = "codes" if any(weights.codings) else "bfloat16"
        blocks = choose_blocks(rows, weights.dims[0], jax.devices()[0].device_kind, kind)
    if blocks.kernel == "prefill" and any(weights.codings):
        raise ValueError("grouped_mlp_pallas_gpu: 'prefill' takes no quantised weights, 'decode' does")
    blocks = fit_blocks(blocks, weights.dims[1], model, weights.codings)
    if max(blocks.smem()) > SMEM_LIMIT:
        raise ValueError(
            f"grouped_mlp_pallas_gpu: {blocks} need {max(blocks.smem())} bytes of shared memory, "
            f"the limit is {SMEM_LIMIT}"
        )
    padded_rows = -(-max(rows, blocks.rows) // ALIGN) * ALIGN
    x_ND = jnp.pad(x_ND, ((0, padded_rows - rows), (0, 0)))
    is_decode = blocks.kernel == "decode"
    windows_W4, place_N2 = windows(group_sizes_E, padded_rows, blocks.rows, compact=not is_decode)
    with jax.named_scope(f"grouped_mlp_{blocks.kernel}"):
        if not is_decode:
            h = prefill.gate_up(x_ND, weights, windows_W4, activation, blocks, interpret)
            return prefill.down(h, weights, windows_W4, padded_rows, blocks, interpret)[:rows]
        h = decode.gate_up(x_ND, weights, windows_W4, activation, blocks, interpret, activations)
        y_WRD = decode.down(h, weights, windows_W4, blocks, interpret, activations)
    is_grouped_N = jnp.arange(rows) < jnp.sum(group_sizes_E)
    window_N, place_in_N = place_N2[:rows, 0], place_N2[:rows, 1]
    return jnp.where(is_grouped_N[:, None], y_WRD[window_N, place_in_N], 0.0)
