"""Kernels for few rows per expert: weights are the M operand of wgmma, so 1-64 rows waste no product.

Rows are its N operand. The kernels are memory bound: every active expert's weights stream through shared
memory once per window, by TMA, in 64 x 64 tiles or longer ones (``factor``). The first kernel computes gate
and up with the activation, the second down. A unit of work is one (window, weight tile); thread blocks of
idle windows exit at once.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import BFloat16, Float, Int

from jmoe_kernels.grouped_mlp.pallas_gpu.blocks import (
    ALIGN,
    EXPERT,
    ROW,
    BlockSizes,
    launch,
)
from jmoe_kernels.grouped_mlp.pallas_gpu.contraction import contracted, times_units
from jmoe_kernels.grouped_mlp.pallas_gpu.factor import Factor, arrays_of, rounded
from jmoe_kernels.grouped_mlp.types import ExpertWeights, gated
from jmoe_kernels.quantised import coding_of
from jmoe_kernels.quantised.tiles import TILE
from jmoe_kernels.settings import Activation, Activations


def gate_up(
    x_ND: BFloat16[Array, "N D"],
    weights: ExpertWeights,
    windows_W4: Int[Array, "W 4"],
    activation: Activation,
    blocks: BlockSizes,
    interpret: bool,
    activations: Activations = "auto",
) -> BFloat16[Array, "W R F"]:
    """Returns ``act(gate x) * up x`` of every window; what idle windows hold is undefined."""
    experts, inner, model = weights.dims
    rows, tiles, bias = blocks.rows, inner // TILE, weights.gate_up_bias_E2F
    factor = Factor(coding_of(weights.gate_up_E2FD), model, blocks.k_up, rows, activations)
    operands = Operands(arrays_of(weights.gate_up_E2FD), rounded(factor, x_ND), bias)

    def kernel(*references):
        (x, units), w, bias_ref, windows, h = operands.split(references)
        unit = lax.axis_index("unit")
        window, f = lax.div(unit, tiles), lax.rem(unit, tiles)
        e = windows[window, EXPERT]

        @pl.when((e >= 0) & (e < experts))
        def _():
            own = pl.ds(pl.multiple_of(windows[window, ROW], ALIGN), rows)
            sources = [factor.sources(w, e, p, f) for p in (0, 1)]

            gate, up = contracted(factor, sources, f, x.at[own], blocks.stages_up, interpret)
            gate, up = (factor.end(sums, w, e, p, f) for p, sums in enumerate((gate, up)))
            if units is not None:
                gate, up = times_units(gate, units.at[own]), times_units(up, units.at[own])
            if bias_ref is not None:
                gate = add_bias(gate, bias_ref.at[e, 0, pl.ds(f * TILE, TILE)])
                up = add_bias(up, bias_ref.at[e, 1, pl.ds(f * TILE, TILE)])
            store_transposed(
                gated(activation, gate, up).astype(h.dtype), h.at[window, :, pl.ds(f * TILE, TILE)], interpret
            )

    return launch(
        kernel,
        jax.ShapeDtypeStruct((windows_W4.shape[0], rows, inner), jnp.bfloat16),
        interpret,
        grid=(windows_W4.shape[0] * tiles,),
        grid_names=("unit",),
        kernel_name="jmoe_decode_gate_up",
    )(*operands.arrays(windows_W4))


@dataclass(frozen=True)
class Operands:
    """A kernel's arrays: those of its weights, the rows and perhaps their units, perhaps biases."""

    weights: tuple[Array, ...]
    rows: tuple[Array, ...]
    bias: Array | None

    def arrays(self, windows_W4: Array) -> tuple[Array, ...]:
        biases = () if self.bias is None else (self.bias.astype(jnp.float32),)
        return (*self.rows, *self.weights, *biases, windows_W4)

    def split(self, references: tuple) -> tuple[tuple, tuple, Any, Any, Any]:
        """Returns the references of the rows and their units, of the weights, of the biases, of the windows,
        and of the result; None in the place of what there is not."""
        count, end = len(self.rows), len(self.rows) + len(self.weights)
        rows = (references[0], references[1] if count > 1 else None)
        bias = None if self.bias is None else references[end]
        return rows, references[count:end], bias, references[-2], references[-1]


def add_bias(acc, bias):
    """Adds the float32 vector at ``bias`` (in device memory) to ``acc`` along its rows."""

    def load(bias_s, barrier):
        plgpu.copy_gmem_to_smem(bias, bias_s, barrier)
        plgpu.barrier_wait(barrier)
        return acc + lax.broadcast_in_dim(bias_s[...], acc.shape, (0,))

    return pl.run_scoped(load, plgpu.SMEM(bias.shape, jnp.float32), plgpu.Barrier())


def store_transposed(value, destination, interpret: bool) -> None:
    """Stores the transpose of a register tile to device memory through shared memory."""

    def store(tile):
        if interpret:
            tile[...] = value.T
        else:
            tile.T[...] = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, destination)
        plgpu.wait_smem_to_gmem(0)

    pl.run_scoped(store, plgpu.SMEM(value.shape[::-1], value.dtype))


def down(
    h_WRF: BFloat16[Array, "W R F"],
    weights: ExpertWeights,
    windows_W4: Int[Array, "W 4"],
    blocks: BlockSizes,
    interpret: bool,
    activations: Activations = "auto",
) -> Float[Array, "W R D"]:
    """Returns ``down h`` of every window in float32.

    The contents of idle windows, and of rows that are not the window's own, are undefined.
    """
    experts, inner, model = weights.dims
    rows, tiles, bias = blocks.rows, model // TILE, weights.down_bias_ED
    factor = Factor(coding_of(weights.down_EDF), inner, blocks.k_down, rows, activations)
    operands = Operands(arrays_of(weights.down_EDF[:, None]), rounded(factor, h_WRF), bias)

    def kernel(*references):
        (h, units), w, bias_ref, windows, y = operands.split(references)
        unit = lax.axis_index("unit")
        window, d = lax.div(unit, tiles), lax.rem(unit, tiles)
        e = windows[window, EXPERT]

        @pl.when((e >= 0) & (e < experts))
        def _():
            sources = [factor.sources(w, e, 0, d)]
            (value,) = contracted(factor, sources, d, h.at[window], blocks.stages_down, interpret)
            value = factor.end(value, w, e, 0, d)
            if units is not None:
                value = times_units(value, units.at[window])
            if bias_ref is not None:
                value = add_bias(value, bias_ref.at[e, pl.ds(d * TILE, TILE)])
            store_transposed(value, y.at[window, :, pl.ds(d * TILE, TILE)], interpret)

    return launch(
        kernel,
        jax.ShapeDtypeStruct((windows_W4.shape[0], rows, model), jnp.float32),
        interpret,
        grid=(windows_W4.shape[0] * tiles,),
        grid_names=("unit",),
        kernel_name="jmoe_decode_down",
    )(*operands.arrays(windows_W4))
