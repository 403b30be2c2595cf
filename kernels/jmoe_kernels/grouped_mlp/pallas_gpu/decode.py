"""Kernels for few rows per expert: weights are the M operand of wgmma, so 1-64 rows waste no product.

Rows are its N operand. The kernels are memory bound: every active expert's weights stream through shared
memory once per window, by TMA, in the checkpoint's own layout. The first kernel computes gate and up with the
activation, the second down. A unit of work is one (window, weight tile); thread blocks of idle windows exit
at once.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import BFloat16, Float, Int

from jmoe_kernels.grouped_mlp.pallas_gpu.blocks import (
    ACC,
    ALIGN,
    EXPERT,
    ROW,
    BlockSizes,
    launch,
    wgmma_nt,
)
from jmoe_kernels.grouped_mlp.types import ExpertWeights, gated
from jmoe_kernels.settings import Activation


def gate_up(
    x_ND: BFloat16[Array, "N D"],
    weights: ExpertWeights,
    windows_W4: Int[Array, "W 4"],
    activation: Activation,
    blocks: BlockSizes,
    interpret: bool,
) -> BFloat16[Array, "W F R"]:
    """Returns ``act(gate x) * up x`` of every window, transposed; what idle windows hold is undefined."""
    experts, inner, model = weights.dims
    rows, tile, step = blocks.rows, blocks.inner, blocks.k_up
    tiles, bias = inner // tile, weights.gate_up_bias_E2F

    def kernel(x, w, windows, *rest):
        *bias_ref, h = rest
        unit = lax.axis_index("unit")
        window, f = lax.div(unit, tiles), lax.rem(unit, tiles)
        e = windows[window, EXPERT]

        @pl.when((e >= 0) & (e < experts))
        def _():
            row = pl.multiple_of(windows[window, ROW], ALIGN)

            def accumulate(gate_acc, up_acc, transpose=None):
                def contract(_, x_s, gate_s, up_s):
                    wgmma_nt(gate_acc, gate_s, x_s, transpose)
                    wgmma_nt(up_acc, up_s, x_s, transpose)
                    plgpu.wgmma_wait(0)

                plgpu.emit_pipeline(
                    contract,
                    grid=(model // step,),
                    in_specs=[
                        plgpu.BlockSpec((rows, step), lambda k: (0, k)),
                        plgpu.BlockSpec((tile, step), lambda k: (f, k)),
                        plgpu.BlockSpec((tile, step), lambda k: (f, k)),
                    ],
                    max_concurrent_steps=blocks.stages_up,
                )(x.at[pl.ds(row, rows)], w.at[e, 0], w.at[e, 1])
                return gate_acc[...], up_acc[...]

            accs = (ACC((tile, rows)),) * 2
            if interpret:
                spare = plgpu.SMEM((step, rows), x.dtype)
                gate, up = pl.run_scoped(
                    lambda s: pl.run_scoped(partial(accumulate, transpose=s), *accs), spare
                )
            else:
                gate, up = pl.run_scoped(accumulate, *accs)
            if bias_ref:
                gate = add_bias(gate, bias_ref[0].at[e, 0, pl.ds(f * tile, tile)])
                up = add_bias(up, bias_ref[0].at[e, 1, pl.ds(f * tile, tile)])
            store_tile(gated(activation, gate, up).astype(h.dtype), h.at[window, pl.ds(f * tile, tile)])

    return launch(
        kernel,
        jax.ShapeDtypeStruct((windows_W4.shape[0], inner, rows), x_ND.dtype),
        interpret,
        grid=(windows_W4.shape[0] * tiles,),
        grid_names=("unit",),
        kernel_name="jmoe_decode_gate_up",
    )(x_ND, weights.gate_up_E2FD, windows_W4, *(() if bias is None else (bias.astype(jnp.float32),)))


def add_bias(acc, bias):
    """Adds the float32 vector at ``bias`` (in device memory) to ``acc`` along its rows."""

    def load(bias_s, barrier):
        plgpu.copy_gmem_to_smem(bias, bias_s, barrier)
        plgpu.barrier_wait(barrier)
        return acc + lax.broadcast_in_dim(bias_s[...], acc.shape, (0,))

    return pl.run_scoped(load, plgpu.SMEM(bias.shape, jnp.float32), plgpu.Barrier())


def store_tile(value, destination, transposed: bool = False, interpret: bool = False) -> None:
    """Stores a register tile, or its transpose, to device memory through shared memory."""

    def store(tile):
        if not transposed:
            tile[...] = value
        elif interpret:
            tile[...] = value.T
        else:
            tile.T[...] = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, destination)
        plgpu.wait_smem_to_gmem(0)

    pl.run_scoped(store, plgpu.SMEM(value.shape[::-1] if transposed else value.shape, value.dtype))


def down(
    h_WFR: BFloat16[Array, "W F R"],
    weights: ExpertWeights,
    windows_W4: Int[Array, "W 4"],
    blocks: BlockSizes,
    interpret: bool,
) -> Float[Array, "W R D"]:
    """Returns ``down h`` of every window in float32.

    The contents of idle windows, and of rows that are not the window's own, are undefined.
    """
    experts, inner, model = weights.dims
    rows, tile, step = blocks.rows, blocks.model, blocks.k_down
    tiles, bias = model // tile, weights.down_bias_ED

    def kernel(h, w, windows, *rest):
        *bias_ref, y = rest
        unit = lax.axis_index("unit")
        window, d = lax.div(unit, tiles), lax.rem(unit, tiles)
        e = windows[window, EXPERT]

        @pl.when((e >= 0) & (e < experts))
        def _():
            def accumulate(acc):
                def contract(_, h_s, w_s):
                    plgpu.wgmma(acc, w_s, h_s)
                    plgpu.wgmma_wait(0)

                plgpu.emit_pipeline(
                    contract,
                    grid=(inner // step,),
                    in_specs=[
                        plgpu.BlockSpec((step, rows), lambda k: (k, 0)),
                        plgpu.BlockSpec((tile, step), lambda k: (d, k)),
                    ],
                    max_concurrent_steps=blocks.stages_down,
                )(h.at[window], w.at[e])
                return acc[...]

            value = pl.run_scoped(accumulate, ACC((tile, rows)))
            if bias_ref:
                value = add_bias(value, bias_ref[0].at[e, pl.ds(d * tile, tile)])
            store_tile(value, y.at[window, :, pl.ds(d * tile, tile)], transposed=True, interpret=interpret)

    return launch(
        kernel,
        jax.ShapeDtypeStruct((windows_W4.shape[0], rows, model), jnp.float32),
        interpret,
        grid=(windows_W4.shape[0] * tiles,),
        grid_names=("unit",),
        kernel_name="jmoe_decode_down",
    )(h_WFR, weights.down_EDF, windows_W4, *(() if bias is None else (bias.astype(jnp.float32),)))
