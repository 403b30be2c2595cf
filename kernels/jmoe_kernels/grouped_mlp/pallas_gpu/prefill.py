"""Kernels for many rows per expert: tiles of 128 rows by 256 weight rows.

Two warpgroups compute and one loads. The kernels are compute bound: rows are the M operand, one warpgroup
takes the upper half of a window's rows and the other the lower, and the loading one runs ahead into the next
tile while they finish theirs. Thread blocks are persistent. WIDE windows share a weight tile before the next
tile starts, so that an expert's weights come from device memory once, and from the cache for its other
windows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    ROWS,
    SKIP,
    STORE_BYTES,
    WIDE,
    BlockSizes,
    launch,
    store_rows,
    wgmma_nt,
)
from jmoe_kernels.grouped_mlp.types import ExpertWeights, gated
from jmoe_kernels.settings import Activation

WARPGROUPS = 2  # warpgroups that compute
LOADER_REGISTERS = 40  # the loading warpgroup spills with 24


@dataclass(frozen=True)
class _Stage:
    """The parts in which the two kernels differ.

    name: name of the kernel.
    tile: number of weight rows of a tile.
    step: step of the contraction.
    stages: number of steps in flight.
    rows_of: function (a, windows, window) that returns the window's rows of the left operand.
    combine: function (parts) that returns a tile's columns from those of each product.
    store: ``_store_all`` or ``_store_own_rows``.
    zeros_past_end: whether the kernel writes zeros to rows past the last group.
    """

    name: str
    tile: int
    step: int
    stages: int
    rows_of: Callable
    combine: Callable
    store: Callable
    zeros_past_end: bool
    interpret: bool


class _Target(NamedTuple):
    """The place of a tile of results.

    windows: table of windows.
    window: window of the tile.
    first: first row of the tile within the window.
    column: first column of the tile.
    num_columns: number of columns of the tile.
    """

    windows: Any
    window: Any
    first: Any
    column: Any
    num_columns: int


def gate_up(
    x_ND: BFloat16[Array, "N D"],
    weights: ExpertWeights,
    windows_W4: Int[Array, "W 4"],
    activation: Activation,
    blocks: BlockSizes,
    interpret: bool,
) -> BFloat16[Array, "W R F"]:
    """Returns ``act(gate x) * up x`` of every window; what idle windows hold is undefined."""
    stage = _Stage(
        name="jmoe_prefill_gate_up",
        tile=blocks.inner,
        step=blocks.k_up,
        stages=blocks.stages_up,
        rows_of=lambda x, windows, w: x.at[pl.ds(pl.multiple_of(windows[w, ROW], ALIGN), blocks.rows)],
        combine=lambda parts: gated(activation, *parts).astype(x_ND.dtype),
        store=_store_all,
        zeros_past_end=False,
        interpret=interpret,
    )
    out_type = jax.ShapeDtypeStruct((windows_W4.shape[0], blocks.rows, weights.dims[1]), x_ND.dtype)
    return _run(stage, x_ND, weights.gate_up_E2FD, windows_W4, weights.gate_up_bias_E2F, out_type, blocks)


def down(
    h_WRF: BFloat16[Array, "W R F"],
    weights: ExpertWeights,
    windows_W4: Int[Array, "W 4"],
    rows_out: int,
    blocks: BlockSizes,
    interpret: bool,
) -> Float[Array, "N D"]:
    """Returns ``down h`` of every window at its rows of y, float32; rows past the last group are zero."""
    stage = _Stage(
        name="jmoe_prefill_down",
        tile=blocks.model,
        step=blocks.k_down,
        stages=blocks.stages_down,
        rows_of=lambda h, windows, w: h.at[w],
        combine=lambda parts: parts[0],
        store=_store_own_rows,
        zeros_past_end=True,
        interpret=interpret,
    )
    bias = weights.down_bias_ED
    bias_E1D = None if bias is None else bias[:, None]
    out_type = jax.ShapeDtypeStruct((rows_out, weights.dims[2]), jnp.float32)
    return _run(stage, h_WRF, weights.down_EDF[:, None], windows_W4, bias_E1D, out_type, blocks)


def _run(stage: _Stage, a, w_EPOI, windows_W4, bias_EPO, out_type, blocks: BlockSizes) -> Array:
    """Runs the persistent kernel: each window's rows of ``a`` times P matrices [out, in], combined."""
    experts, products, out, depth = w_EPOI.shape
    half, tile, has_bias = blocks.rows // WARPGROUPS, stage.tile, bias_EPO is not None
    steps = depth // stage.step

    def kernel(a, w, windows, *rest):
        *bias, out_ref = rest
        wg = lax.axis_index("wg")

        def with_memory(
            allocations, tile_s, bias_s: Any = None, bias_barrier: Any = None, transpose: Any = None
        ):
            contract = _contraction(stage, wg, half, transpose)

            def one_tile(window, t):
                e, columns = windows[window, EXPERT], pl.ds(t * tile, tile)

                def store(chunk):
                    target = _Target(windows, window, wg * half, t * tile, tile)
                    stage.store(chunk, out_ref, tile_s.at[wg], target)

                def context(run):
                    def scope(*accs):
                        if has_bias:
                            for p in range(products):
                                source = bias[0].at[e, p, columns]
                                plgpu.copy_gmem_to_smem(source, bias_s.at[wg, p], bias_barrier.at[wg])
                        run(accs)
                        values = [acc[...] for acc in accs]
                        if has_bias:
                            plgpu.barrier_wait(bias_barrier.at[wg])
                        store(lambda c, width: stage.combine(_columns(values, bias_s, wg, c, width)))

                    pl.run_scoped(scope, *[ACC((half, tile))] * products)

                @pl.when((e >= 0) & (e < experts))
                def _():
                    parts = [w.at[e, p, columns] for p in range(products)]
                    pipeline = _pipeline(stage, contract, context, steps, blocks.rows, products)
                    pipeline(stage.rows_of(a, windows, window), *parts, allocations=allocations)

                if stage.zeros_past_end:

                    @pl.when((e == experts) & (wg < WARPGROUPS))
                    def _():
                        store(lambda _, width: jnp.zeros((half, width), jnp.float32))

            _for_tiles(one_tile, windows.shape[0], out // tile)
            plgpu.wait_smem_to_gmem(0)

        pipeline = _pipeline(stage, _nothing, _nothing, steps, blocks.rows, products)
        examples = stage.rows_of(a, windows, 0), *[w.at[0, 0, pl.ds(0, tile)]] * products
        pl.run_scoped(
            with_memory,
            allocations=pipeline.get_allocations(*examples),
            **_scratch(stage, half, out_ref.dtype, products, has_bias),
            collective_axes="wg",
        )

    threads = {"num_threads": WARPGROUPS + 1, "thread_name": "wg"}
    grid = {"grid": (blocks.sms,), "grid_names": ("sm",)}
    call = launch(kernel, out_type, stage.interpret, kernel_name=stage.name, **grid, **threads)
    return call(a, w_EPOI, windows_W4, *((bias_EPO.astype(jnp.float32),) if has_bias else ()))


def _contraction(stage: _Stage, wg, half: int, transpose) -> Callable:
    """Returns the body of the pipeline: this warpgroup's rows times a step of each weight tile."""

    def contract(_, a_s, *rest):
        *w_s, accs = rest
        for acc, w_part in zip(accs, w_s, strict=True):
            spare = None if transpose is None else transpose.at[wg]
            wgmma_nt(acc, a_s.at[pl.ds(wg * half, half)], w_part, spare)
        # Releasing a step later (delay_release) would keep a product in flight, but the pipeline does not
        # await the last release: the next tile's first loads would overwrite operands still being read.
        plgpu.wgmma_wait(0)
        return accs

    return contract


def _pipeline(stage: _Stage, body, context, steps: int, rows: int, products: int):
    """Returns the pipeline of loads over the contraction.

    A step loads ``rows`` rows of the left operand and a tile of each weight matrix.
    """
    return plgpu.emit_pipeline_warp_specialized(
        body,
        grid=(steps,),
        memory_registers=LOADER_REGISTERS,
        in_specs=[
            plgpu.BlockSpec((r, stage.step), lambda k: (0, k)) for r in (rows, *[stage.tile] * products)
        ],
        wg_axis="wg",
        num_compute_wgs=WARPGROUPS,
        max_concurrent_steps=stage.stages,
        compute_context=context,
    )


def _nothing(*_, **__):
    pass


def _scratch(stage: _Stage, half: int, dtype, products: int, has_bias: bool) -> dict:
    """Returns the shared memory of each computing warpgroup.

    It holds a tile to store, biases, and the spare of ``wgmma_nt``.
    """
    width = min(stage.tile, STORE_BYTES // jnp.dtype(dtype).itemsize)
    scratch: dict[str, Any] = {"tile_s": plgpu.SMEM((WARPGROUPS, half, width), dtype)}
    if has_bias:
        scratch["bias_s"] = plgpu.SMEM((WARPGROUPS, products, stage.tile), jnp.float32)
        scratch["bias_barrier"] = plgpu.Barrier(num_arrivals=products, num_barriers=WARPGROUPS)
    if stage.interpret:
        scratch["transpose"] = plgpu.SMEM((WARPGROUPS, stage.step, stage.tile), jnp.bfloat16)
    return scratch


def _columns(values, bias_s, wg, start: int, width: int) -> list:
    """Returns columns of each product, with their bias."""
    parts = [value[:, start : start + width] for value in values]
    if bias_s is None:
        return parts
    vectors = [bias_s.at[wg, p, pl.ds(start, width)] for p in range(len(parts))]
    return [v + lax.broadcast_in_dim(b[...], v.shape, (1,)) for v, b in zip(parts, vectors, strict=True)]


def _store_all(chunk, h, tile_s, target: _Target) -> None:
    """Stores ``chunk(start, width)`` of every column to the window's rows of h, from ``first`` on."""
    half, width = tile_s.shape
    for c in range(0, target.num_columns, width):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        tile_s[...] = chunk(c, width)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            tile_s, h.at[target.window, pl.ds(target.first, half), pl.ds(target.column + c, width)]
        )


def _store_own_rows(chunk, y, tile_s, target: _Target) -> None:
    """Stores ``chunk(start, width)`` of every column to those rows of y that the window owns.

    The rows are those of the chunk, which begins at the window's row ``first``. If the window owns all of
    them they go straight from registers, 32 bytes per row and instruction; if it owns some, they go through
    shared memory.
    """
    half, width = tile_s.shape
    windows, window, first, column, columns = target
    low = jnp.clip(windows[window, SKIP] - first, 0, half)
    high = jnp.clip(windows[window, SKIP] + windows[window, ROWS] - first, 0, half)
    count, row = jnp.maximum(high - low, 0), windows[window, ROW] + first

    @pl.when(count == half)
    def _():
        for c in range(0, columns, width):
            y[pl.ds(row, half), pl.ds(column + c, width)] = chunk(c, width)

    @pl.when((count > 0) & (count < half))
    def _():
        for c in range(0, columns, width):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            tile_s[...] = chunk(c, width)
            plgpu.commit_smem()
            store_rows(tile_s, y, low, count, row + low, column + c)


def _for_tiles(one_tile, windows: int, tiles: int) -> None:
    """Calls ``one_tile(window, tile)`` for this thread block's share: WIDE windows, then the next tile."""

    @plgpu.nd_loop((windows * tiles,), collective_axes="sm")
    def _(loop):
        (unit,) = loop.index
        group, place = lax.div(unit, WIDE * tiles), lax.rem(unit, WIDE * tiles)
        one_tile(group * WIDE + lax.rem(place, WIDE), lax.div(place, WIDE))
