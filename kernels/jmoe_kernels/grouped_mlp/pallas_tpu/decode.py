"""Decode kernel for few rows per expert: it takes the time of reading the active experts' weights once.

All rows and the float32 result stay in VMEM. One flattened loop runs over (active expert x chunk of F); the
chunks' DMAs are started ``buffers - 1`` steps ahead, across expert boundaries, so that the stream never waits
for a product. The list of active experts is made by the kernel's own scalar loop over
``group_sizes_E``, which is shorter than the launch of the few XLA operations that it would take.

A chunk is gate and up rows ``[2, inner, D]`` (two contiguous pieces) and down columns ``[D, inner]`` (pieces
of 16 rows x inner), straight from the checkpoint's layout. Both products contract the minor axes (NT), and
nothing is transposed for that: on v5e, v5p and v6e the weights are turned as they are loaded into the matrix
unit (``vmatpush.xpose``), and the schedules use the transpose unit (XLU) in no bundle.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from jmoe_kernels.grouped_mlp.pallas_tpu.blocks import BlockSizes
from jmoe_kernels.grouped_mlp.pallas_tpu.chunk import fill_zero, over_windows
from jmoe_kernels.grouped_mlp.pallas_tpu.forms import mlp_of, scratch_of
from jmoe_kernels.grouped_mlp.pallas_tpu.operands import Operands, Ref
from jmoe_kernels.settings import Activation


def _find_active(sizes_E: Ref, active_E: Ref, start_E: Ref) -> Array:
    """Writes the experts with rows, and their first rows, to the front of two lists; returns their number."""

    def visit(e: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        row, n = carry
        active_E[n] = e
        start_E[n] = row
        return row + sizes_E[e], n + (sizes_E[e] > 0).astype(jnp.int32)

    return lax.fori_loop(0, sizes_E.shape[0], visit, (jnp.int32(0), jnp.int32(0)))[1]


def _kernel(
    sizes_E: Ref, *refs: Ref, operands: Operands, blocks: BlockSizes, steps: int, activation: Activation
) -> None:
    r, n = len(operands.rows), len(operands.stacks)
    rows_hbm, hbm, y_hbm, refs = refs[:r], refs[r : r + n], refs[r + n], refs[r + n + 1 :]
    rows, y_ND, buffers, (*scratch, active_E, start_E, sems, row_sem) = (
        refs[:r], refs[r], refs[r + 1 : r + 1 + n], refs[r + 1 + n :],
    )  # fmt: skip
    core = pl.program_id(0)
    total = _find_active(sizes_E, active_E, start_E) * steps
    begin, end = total * core // blocks.cores, total * (core + 1) // blocks.cores

    def copies(s: Array) -> list:
        e, slot = active_E[s // steps], s % blocks.buffers
        stacks = operands.stacks.values()
        chunks = [stack.chunk_of(ref, e, s % steps, steps) for stack, ref in zip(stacks, hbm, strict=True)]
        pairs = enumerate(zip(chunks, buffers, strict=True))
        return [pltpu.make_async_copy(c, buf.at[slot], sems.at[i, slot]) for i, (c, buf) in pairs]

    def start(s: Array) -> None:
        @pl.when(s < end)
        def _() -> None:
            for c in copies(s):
                c.start()

    for i in range(blocks.buffers - 1):
        start(begin + i)
    loads = [pltpu.make_async_copy(*pair, row_sem) for pair in zip(rows_hbm, rows, strict=True)]
    for load in loads:
        load.start()
    fill_zero(y_ND)
    for load in loads:
        load.wait()
    by_name = dict(zip(operands.rows, rows, strict=True))
    chunk_mlp = mlp_of(blocks.form)

    def step(s: Array, _: None) -> None:
        start(s + blocks.buffers - 1)
        for c in copies(s):
            c.wait()
        e, slot = active_E[s // steps], s % blocks.buffers
        chunk = {name: buf.at[slot] for name, buf in zip(operands.stacks, buffers, strict=True)}
        row, settings = start_E[s // steps], {"blocks": blocks, "activation": activation}
        mlp = partial(chunk_mlp, by_name, y_ND, scratch, chunk, **settings, first=s % steps == 0)
        over_windows(row, jnp.minimum(row + sizes_E[e], blocks.rows), blocks, mlp)

    lax.fori_loop(begin, end, step, None)
    store_y = pltpu.make_async_copy(y_ND, y_hbm.at[core], row_sem)
    store_y.start()
    store_y.wait()


def decode(
    operands: Operands,
    group_sizes_E: Int[Array, " E"],
    blocks: BlockSizes,
    *,
    activation: Activation,
    interpret: bool | pltpu.InterpretParams,
) -> Float[Array, "N D"]:
    """Runs rows through their expert's MLP. The arrays of rows are those of ``blocks.rows`` rows."""
    experts, f, model = operands.dims
    steps, stacks = f // blocks.inner, operands.stacks.values()
    hbm, rows = pl.BlockSpec(memory_space=pl.ANY), operands.rows
    kernel = partial(_kernel, operands=operands, blocks=blocks, steps=steps, activation=activation)
    y_CND = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((blocks.cores, blocks.rows, model), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(blocks.cores,),
            in_specs=[hbm] * (len(rows) + len(stacks)),
            out_specs=hbm,
            scratch_shapes=[
                *(pltpu.VMEM(array.shape, array.dtype) for array in rows.values()),
                pltpu.VMEM((blocks.rows, model), jnp.float32),
                *(pltpu.VMEM((blocks.buffers, *s.chunk_shape(steps)), s.array.dtype) for s in stacks),
                *scratch_of(blocks, rows["x"].dtype),
                pltpu.SMEM((experts,), jnp.int32),
                pltpu.SMEM((experts,), jnp.int32),
                pltpu.SemaphoreType.DMA((len(stacks), blocks.buffers)),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=blocks.vmem_limit
        ),
        cost_estimate=operands.cost(min(experts, operands.num_rows)),
        interpret=interpret,
        name="grouped_mlp_decode",
    )(group_sizes_E, *rows.values(), *(stack.array for stack in stacks))
    return (y_CND[0] if blocks.cores == 1 else jnp.sum(y_CND, 0))[: operands.num_rows]
