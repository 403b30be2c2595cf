"""Many rows an expert: tiles of 128 rows by 256 weight rows, computed by two warpgroups and loaded by a third.

Compute bound: rows are the M operand, one warpgroup takes the upper 64 rows of a window and the other the lower
ones, and the loading warpgroup runs ahead into the next tile while the computing ones finish theirs. Thread
blocks are persistent. WIDE windows share a weight tile before the next tile starts, so that an expert's weights
come from device memory once, and from the cache for its other windows.
"""

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
    ROWS,
    SKIP,
    STORE_BYTES,
    WIDE,
    Blocks,
    launch,
    store_rows,
    wgmma_nt,
)
from jmoe_kernels.grouped_mlp.types import Activation, ExpertWeights, gated

WARPGROUPS = 2  # that compute


def gate_up(
    x_ND: BFloat16[Array, "N D"],
    weights: ExpertWeights,
    windows_W4: Int[Array, "W 4"],
    activation: Activation,
    blocks: Blocks,
    interpret: bool,
) -> BFloat16[Array, "W R F"]:
    """``act(gate x) * up x`` of every window; what idle windows hold is undefined."""
    experts, inner, model = weights.dims
    rows, tile, step = blocks.rows, blocks.inner, blocks.k_up
    half, bias = rows // WARPGROUPS, weights.gate_up_bias_E2F

    def kernel(x, w, windows, *rest):
        *bias_ref, h = rest
        wg = lax.axis_index("wg")
        mine = pl.ds(wg * half, half)

        def pipeline(body, context):
            return _pipeline(body, context, model // step, blocks.stages_up, (rows, tile, tile), step)

        def with_memory(allocations, tile_s, bias_s=None, fetched=None, turned=None):
            def contract(_, x_s, gate_s, up_s, accs):
                spare = None if turned is None else turned.at[wg]
                wgmma_nt(accs[0], x_s.at[mine], gate_s, spare)
                wgmma_nt(accs[1], x_s.at[mine], up_s, spare)
                _release(blocks.stages_up, 2)
                return accs

            def one_tile(window, f):
                e = windows[window, EXPERT]
                columns = pl.ds(f * tile, tile)

                def context(run):
                    def scope(gate_acc, up_acc):
                        if bias_ref:
                            _fetch([bias_ref[0].at[e, i, columns] for i in range(2)], bias_s, fetched, wg)
                        run((gate_acc, up_acc))
                        gate, up = gate_acc[...], up_acc[...]
                        if bias_ref:
                            plgpu.barrier_wait(fetched.at[wg])
                            gate, up = (_add(v, bias_s.at[wg, i]) for i, v in enumerate((gate, up)))
                        value = gated(activation, gate, up).astype(h.dtype)
                        _store_all(value, h.at[window, mine, columns], tile_s.at[wg])

                    pl.run_scoped(scope, plgpu.ACC((half, tile)), plgpu.ACC((half, tile)))

                @pl.when((e >= 0) & (e < experts))
                def _():
                    pipeline(contract, context)(
                        x.at[pl.ds(pl.multiple_of(windows[window, ROW], ALIGN), rows)],
                        w.at[e, 0, columns],
                        w.at[e, 1, columns],
                        allocations=allocations,
                    )

            _for_tiles(one_tile, windows.shape[0], inner // tile)
            plgpu.wait_smem_to_gmem(0)

        rows_ref, w_ref = x.at[pl.ds(0, rows)], w.at[0, 0, pl.ds(0, tile)]
        pl.run_scoped(
            with_memory,
            allocations=pipeline(_nothing, _nothing).get_allocations(rows_ref, w_ref, w_ref),
            tile_s=plgpu.SMEM((WARPGROUPS, half, min(tile, STORE_BYTES // 2)), h.dtype),
            **_scratch(2 if bias_ref else 0, step, tile, interpret),
            collective_axes="wg",
        )

    out_type = jax.ShapeDtypeStruct((windows_W4.shape[0], rows, inner), x_ND.dtype)
    arguments = (
        x_ND,
        weights.gate_up_E2FD,
        windows_W4,
        *(() if bias is None else (bias.astype(jnp.float32),)),
    )
    return _launch(kernel, out_type, blocks, interpret, "jmoe_prefill_gate_up")(*arguments)


def down(
    h_WRF: BFloat16[Array, "W R F"],
    weights: ExpertWeights,
    windows_W4: Int[Array, "W 4"],
    rows_out: int,
    blocks: Blocks,
    interpret: bool,
) -> Float[Array, "N D"]:
    """``down h`` of every window at its rows of y, float32; rows past the last group are zero."""
    experts, inner, model = weights.dims
    rows, tile, step = blocks.rows, blocks.model, blocks.k_down
    half, bias = rows // WARPGROUPS, weights.down_bias_ED

    def kernel(h, w, windows, *rest):
        *bias_ref, y = rest
        wg = lax.axis_index("wg")
        mine = pl.ds(wg * half, half)

        def pipeline(body, context):
            return _pipeline(body, context, inner // step, blocks.stages_down, (rows, tile), step)

        def with_memory(allocations, tile_s, bias_s=None, fetched=None, turned=None):
            def contract(_, h_s, w_s, acc):
                wgmma_nt(acc, h_s.at[mine], w_s, None if turned is None else turned.at[wg])
                _release(blocks.stages_down, 1)
                return acc

            def one_tile(window, d):
                e = windows[window, EXPERT]

                def store(part):
                    _store_own_rows(part, y, tile_s.at[wg], windows, window, wg * half, d * tile, tile)

                def context(run):
                    def scope(acc):
                        if bias_ref:
                            _fetch([bias_ref[0].at[e, pl.ds(d * tile, tile)]], bias_s, fetched, wg)
                        run(acc)
                        value = acc[...]
                        if bias_ref:
                            plgpu.barrier_wait(fetched.at[wg])

                        def part(c, width):
                            columns = value[:, c : c + width]
                            return _add(columns, bias_s.at[wg, 0, pl.ds(c, width)]) if bias_ref else columns

                        store(part)

                    pl.run_scoped(scope, plgpu.ACC((half, tile)))

                @pl.when((e >= 0) & (e < experts))
                def _():
                    pipeline(contract, context)(
                        h.at[window], w.at[e, pl.ds(d * tile, tile)], allocations=allocations
                    )

                @pl.when((e == experts) & (wg < WARPGROUPS))
                def _():
                    store(lambda _, width: jnp.zeros((half, width), jnp.float32))

            _for_tiles(one_tile, windows.shape[0], model // tile)
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(
            with_memory,
            allocations=pipeline(_nothing, _nothing).get_allocations(h.at[0], w.at[0, pl.ds(0, tile)]),
            tile_s=plgpu.SMEM((WARPGROUPS, half, min(tile, STORE_BYTES // 4)), jnp.float32),
            **_scratch(1 if bias_ref else 0, step, tile, interpret),
            collective_axes="wg",
        )

    out_type = jax.ShapeDtypeStruct((rows_out, model), jnp.float32)
    arguments = (h_WRF, weights.down_EDF, windows_W4, *(() if bias is None else (bias.astype(jnp.float32),)))
    return _launch(kernel, out_type, blocks, interpret, "jmoe_prefill_down")(*arguments)


def _store_own_rows(part, y, tile_s, windows, window, first, column, columns) -> None:
    """Store the rows that the window owns of a tile starting ``first`` rows into it, by ``part(column, width)``.

    All of them straight from registers, 32 bytes a row and instruction; some of them through shared memory.
    """
    half, width = tile_s.shape
    low = jnp.clip(windows[window, SKIP] - first, 0, half)
    high = jnp.clip(windows[window, SKIP] + windows[window, ROWS] - first, 0, half)
    count, row = jnp.maximum(high - low, 0), windows[window, ROW] + first

    @pl.when(count == half)
    def _():
        for c in range(0, columns, width):
            y[pl.ds(row, half), pl.ds(column + c, width)] = part(c, width)

    @pl.when((count > 0) & (count < half))
    def _():
        for c in range(0, columns, width):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            tile_s[...] = part(c, width)
            plgpu.commit_smem()
            store_rows(tile_s, y, low, count, row + low, column + c)


def _for_tiles(one_tile, windows: int, tiles: int) -> None:
    """Call ``one_tile(window, tile)`` for this thread block's share, WIDE windows of a tile after one another."""

    @plgpu.nd_loop((windows * tiles,), collective_axes="sm")
    def _(loop):
        (unit,) = loop.index
        group, place = lax.div(unit, WIDE * tiles), lax.rem(unit, WIDE * tiles)
        one_tile(group * WIDE + lax.rem(place, WIDE), lax.div(place, WIDE))


def _pipeline(body, context, steps: int, stages: int, rows: tuple[int, ...], step: int):
    """The pipeline over ``steps`` of K-major operands with ``rows`` each."""
    return plgpu.emit_pipeline_warp_specialized(
        body,
        grid=(steps,),
        memory_registers=40,
        in_specs=[plgpu.BlockSpec((r, step), lambda k: (0, k), delay_release=int(stages > 1)) for r in rows],
        wg_axis="wg",
        num_compute_wgs=WARPGROUPS,
        max_concurrent_steps=stages,
        compute_context=context,
    )


def _release(stages: int, products: int) -> None:
    """Wait for the step before, whose buffers the pipeline then releases; with one stage for this one."""
    plgpu.wgmma_wait(products if stages > 1 else 0)


def _scratch(biases: int, step: int, tile: int, interpret: bool) -> dict:
    """Shared memory for bias vectors of each computing warpgroup with their barrier, and for ``wgmma_nt``."""
    scratch = {}
    if biases:
        scratch["bias_s"] = plgpu.SMEM((WARPGROUPS, biases, tile), jnp.float32)
        scratch["fetched"] = plgpu.Barrier(num_arrivals=biases, num_barriers=WARPGROUPS)
    if interpret:
        scratch["turned"] = plgpu.SMEM((WARPGROUPS, step, tile), jnp.bfloat16)
    return scratch


def _fetch(vectors, scratch, barrier, wg) -> None:
    for i, vector in enumerate(vectors):
        plgpu.copy_gmem_to_smem(vector, scratch.at[wg, i], barrier.at[wg])


def _add(value, vector):
    """``value`` with the shared-memory ``vector`` added to every row."""
    return value + lax.broadcast_in_dim(vector[...], value.shape, (1,))


def _store_all(value, destination, tile_s) -> None:
    """Store a register tile through the narrower ``tile_s``."""
    width = tile_s.shape[1]
    for c in range(0, value.shape[1], width):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        tile_s[...] = value[:, c : c + width]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile_s, destination.at[:, pl.ds(c, width)])


def _nothing(*_, **__):
    pass


def _launch(kernel, out_type, blocks: Blocks, interpret: bool, name: str):
    return launch(
        kernel,
        out_type,
        interpret,
        grid=(blocks.sms,),
        grid_names=("sm",),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        kernel_name=name,
    )
