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

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from jmoe_kernels.grouped_mlp.pallas_tpu.blocks import LANES, BlockSizes
from jmoe_kernels.grouped_mlp.pallas_tpu.chunk import Ref, Rows, chunk_mlp, cost, fill_zero, over_windows
from jmoe_kernels.settings import Activation


def _chunk_of(name: str, ref: Ref, e: Array, j: Array, inner: int) -> Ref:
    """Returns chunk ``j`` of expert ``e`` in HBM."""
    columns = pl.ds(pl.multiple_of(j * inner, LANES), inner)
    if name == "gate_up":
        return ref.at[e, :, columns, :]
    return ref.at[e] if name == "down_bias" else ref.at[e, :, columns]


def _find_active(sizes_E: Ref, active_E: Ref, start_E: Ref) -> Array:
    """Writes the experts with rows, and their first rows, to the front of two lists; returns their number."""

    def visit(e: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        row, n = carry
        active_E[n] = e
        start_E[n] = row
        return row + sizes_E[e], n + (sizes_E[e] > 0).astype(jnp.int32)

    return lax.fori_loop(0, sizes_E.shape[0], visit, (jnp.int32(0), jnp.int32(0)))[1]


def _kernel(
    sizes_E: Ref,
    x_hbm: Ref,
    *refs: Ref,
    names: Sequence[str],
    blocks: BlockSizes,
    steps: int,
    activation: Activation,
) -> None:
    n = len(names)
    hbm, (y_hbm, x_ND, y_ND), buffers = refs[:n], refs[n : n + 3], refs[n + 3 : 2 * n + 3]
    gate_MF, h_MF, active_E, start_E, sems, row_sem = refs[2 * n + 3 :]
    rows = Rows(x_ND, y_ND, gate_MF, h_MF)
    core = pl.program_id(0)
    total = _find_active(sizes_E, active_E, start_E) * steps
    begin, end = total * core // blocks.cores, total * (core + 1) // blocks.cores

    def copies(s: Array) -> list:
        e, slot = active_E[s // steps], s % blocks.buffers
        chunks = [
            _chunk_of(name, ref, e, s % steps, blocks.inner) for name, ref in zip(names, hbm, strict=True)
        ]
        pairs = enumerate(zip(chunks, buffers, strict=True))
        return [pltpu.make_async_copy(c, buf.at[slot], sems.at[i, slot]) for i, (c, buf) in pairs]

    def start(s: Array) -> None:
        @pl.when(s < end)
        def _() -> None:
            for c in copies(s):
                c.start()

    for i in range(blocks.buffers - 1):
        start(begin + i)
    load_x = pltpu.make_async_copy(x_hbm, x_ND, row_sem)
    load_x.start()
    fill_zero(y_ND)
    load_x.wait()

    def step(s: Array, _: None) -> None:
        start(s + blocks.buffers - 1)
        for c in copies(s):
            c.wait()
        e, slot = active_E[s // steps], s % blocks.buffers
        chunk = {name: buf.at[slot] for name, buf in zip(names, buffers, strict=True)}
        row = start_E[s // steps]
        mlp = partial(chunk_mlp, rows, chunk, blocks=blocks, activation=activation, first=s % steps == 0)
        over_windows(row, jnp.minimum(row + sizes_E[e], blocks.rows), blocks.rows, blocks.windows, mlp)

    lax.fori_loop(begin, end, step, None)
    store_y = pltpu.make_async_copy(y_ND, y_hbm.at[core], row_sem)
    store_y.start()
    store_y.wait()


def decode(
    x_ND: Float[Array, "N D"],
    operands: Mapping[str, Array],
    group_sizes_E: Int[Array, " E"],
    blocks: BlockSizes,
    *,
    activation: Activation,
    interpret: bool | pltpu.InterpretParams,
) -> Float[Array, "N D"]:
    """Runs rows through their expert's MLP.

    operands: weights by name, with biases as [E, 2, F] and [E, 1, D].
    """
    n, model = x_ND.shape
    experts, _, f, _ = operands["gate_up"].shape
    x_ND = jnp.pad(x_ND, ((0, blocks.rows - n), (0, 0)))
    chunks = {
        "gate_up": (2, blocks.inner, model),
        "down": (model, blocks.inner),
        "gate_up_bias": (2, blocks.inner),
        "down_bias": (1, model),
    }
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    kernel = partial(
        _kernel, names=tuple(operands), blocks=blocks, steps=f // blocks.inner, activation=activation
    )
    y_CND = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((blocks.cores, blocks.rows, model), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(blocks.cores,),
            in_specs=[hbm] * (1 + len(operands)),
            out_specs=hbm,
            scratch_shapes=[
                pltpu.VMEM((blocks.rows, model), x_ND.dtype),
                pltpu.VMEM((blocks.rows, model), jnp.float32),
                *(pltpu.VMEM((blocks.buffers, *chunks[k]), w.dtype) for k, w in operands.items()),
                *Rows.scratch(blocks, x_ND.dtype),
                pltpu.SMEM((experts,), jnp.int32),
                pltpu.SMEM((experts,), jnp.int32),
                pltpu.SemaphoreType.DMA((len(operands), blocks.buffers)),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=blocks.vmem_limit
        ),
        cost_estimate=cost(n, operands, min(experts, n)),
        interpret=interpret,
        name="grouped_mlp_decode",
    )(group_sizes_E, x_ND, *operands.values())
    return (y_CND[0] if blocks.cores == 1 else jnp.sum(y_CND, 0))[:n]
