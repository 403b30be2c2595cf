"""Decode kernel: few rows per expert, so the time is that of reading the active experts' weights once.

All rows and the float32 result stay in VMEM. One flattened loop runs over (active expert x chunk of F); the
chunks' DMAs are started ``buffers - 1`` steps ahead, across expert boundaries, so that the stream never waits
for a product. The list of active experts is made by the kernel's own scalar loop over ``group_sizes``, which
is shorter than the launch of the few XLA operations that it would take.

A chunk is gate and up rows ``[2, inner, D]`` (two contiguous pieces) and down columns ``[D, inner]`` (pieces
of 16 rows x inner), straight from the checkpoint's layout. Both products contract the minor axes (NT), and
nothing is transposed for that: on v5e, v5p and v6e the weights are turned as they are loaded into the matrix
unit (``vmatpush.xpose``), and the schedules use the transpose unit (XLU) in no bundle.

The parts that prefill shares (``chunk_mlp``, ``over_windows``) stand here too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from jmoe_kernels.grouped_mlp.pallas_tpu.blocks import LANES, ROW_ALIGN, Blocks
from jmoe_kernels.grouped_mlp.types import Activation, gated

Ref = Array  # a Pallas reference: indexed and sliced as an array is


def dot_nt(a_MK: Array, b_NK: Array) -> Array:
    """``a @ b.T`` with float32 accumulation; float32 operands are not rounded to bfloat16."""
    precision = lax.Precision.HIGHEST if b_NK.dtype == jnp.float32 else None
    dims = (((1,), (1,)), ((), ()))
    return lax.dot_general(a_MK, b_NK, dims, precision=precision, preferred_element_type=jnp.float32)


@dataclass(frozen=True)
class Rows:
    """The rows that a kernel works on in VMEM, and scratch for one window of them.

    x_ND, y_ND: inputs in the weights' dtype and float32 sums. gate_MF, h_MF: float32 gate of one window, and
    its inner activations.
    """

    x_ND: Ref
    y_ND: Ref
    gate_MF: Ref
    h_MF: Ref

    @staticmethod
    def scratch(blocks: Blocks, dtype: jnp.dtype) -> list:
        """Shapes of gate_MF and h_MF."""
        shape = (max(blocks.windows), blocks.inner)
        return [pltpu.VMEM(shape, jnp.float32), pltpu.VMEM(shape, dtype)]


def _over_columns(total: int, width: int, visit: Callable[[Any], None]) -> None:
    """``visit`` on slices of ``width`` columns, then on what is left; a loop keeps few registers live."""
    full, left = divmod(total, width)
    if full == 1:
        visit(pl.ds(0, width))
    else:
        block = lambda i, _: visit(pl.ds(pl.multiple_of(i * width, LANES), width))  # noqa: E731
        lax.fori_loop(0, full, block, None)
    if left:
        visit(pl.ds(full * width, left))


def chunk_mlp(
    rows: Rows,
    chunk: Mapping[str, Ref],
    at: Any,
    mine_M1: Array,
    *,
    blocks: Blocks,
    activation: Activation,
    first: Array,
) -> None:
    """Adds one chunk's share of the expert's output to the rows ``at`` that are ``mine``.

    ``first`` says whether this chunk adds the down bias. gate goes through VMEM: with gate and up both in
    registers the compiler spills.
    """
    _, inner, model = chunk["gate_up"].shape
    here = pl.ds(0, at.size)

    def gate_up(columns: Any) -> None:
        rows.gate_MF[here, columns] = dot_nt(rows.x_ND[at, :], chunk["gate_up"][0, columns, :])
        up = dot_nt(rows.x_ND[at, :], chunk["gate_up"][1, columns, :])
        gate = rows.gate_MF[here, columns]
        if "gate_up_bias" in chunk:
            gate = gate + chunk["gate_up_bias"][0:1, columns].astype(jnp.float32)
            up = up + chunk["gate_up_bias"][1:2, columns].astype(jnp.float32)
        rows.h_MF[here, columns] = gated(activation, gate, up).astype(rows.h_MF.dtype)

    def down(columns: Any) -> None:
        y = dot_nt(rows.h_MF[here, :], chunk["down"][columns, :])
        if "down_bias" in chunk:
            bias = chunk["down_bias"][:, columns].astype(jnp.float32)
            y = y + jnp.where(first, bias, jnp.zeros_like(bias))
        old = rows.y_ND[at, columns]
        rows.y_ND[at, columns] = jnp.where(mine_M1, old + y, old)

    gate_columns, down_columns = blocks.columns(at.size, model)
    _over_columns(inner, gate_columns, gate_up)
    _over_columns(model, down_columns, down)


def over_windows(
    start: Array, end: Array, rows: int, windows: tuple[int, int], visit: Callable[[Any, Array], None]
) -> None:
    """``visit(slice, mine)`` on windows that cover rows [start, end); each row is ``mine`` in exactly one.

    Windows start at a multiple of ROW_ALIGN at or below ``start``. One that would run past the buffer is
    moved back, and leaves out the rows that its predecessor has done. Rows of others in a window are computed
    too and dropped by a select, never by a product with zero: they may be NaN.
    """
    large, small = windows
    base = start // ROW_ALIGN * ROW_ALIGN
    n_large = jnp.maximum(end - base - small + large - 1, 0) // large

    def window(first_row: Array, size: int) -> None:
        moved = jnp.minimum(first_row, rows - size)
        row_M1 = moved + lax.broadcasted_iota(jnp.int32, (size, 1), 0)
        mine_M1 = (row_M1 >= jnp.maximum(first_row, start)) & (row_M1 < end)
        visit(pl.ds(pl.multiple_of(moved, ROW_ALIGN), size), mine_M1)

    lax.fori_loop(0, n_large, lambda i, _: window(base + i * large, large), None)
    pl.when(base + n_large * large < end)(lambda: window(base + n_large * large, small))


def fill_zero(ref: Ref) -> None:
    """Zeros ``ref`` block by block: one store of the whole of it would be unrolled."""
    rows = ref.shape[0]

    def block(i: Array, _: None) -> None:
        ref[pl.ds(pl.multiple_of(i * ROW_ALIGN, ROW_ALIGN), ROW_ALIGN), :] = jnp.zeros(
            (ROW_ALIGN, ref.shape[1]), ref.dtype
        )

    lax.fori_loop(0, rows // ROW_ALIGN, block, None)


def _chunk_of(name: str, ref: Ref, e: Array, j: Array, inner: int) -> Ref:
    """Chunk ``j`` of expert ``e`` in HBM."""
    columns = pl.ds(pl.multiple_of(j * inner, LANES), inner)
    if name == "gate_up":
        return ref.at[e, :, columns, :]
    return ref.at[e] if name == "down_bias" else ref.at[e, :, columns]


def _find_active(sizes_E: Ref, active_E: Ref, start_E: Ref) -> Array:
    """Writes the experts with rows and their first rows to the front of two lists; how many there are."""

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
    blocks: Blocks,
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
        pl.when(s < end)(lambda: [c.start() for c in copies(s)] and None)

    for ahead in range(blocks.buffers - 1):
        start(begin + ahead)
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
    blocks: Blocks,
    *,
    activation: Activation,
    interpret: bool | pltpu.InterpretParams,
) -> Float[Array, "N D"]:
    """Rows through their expert's MLP. ``operands``: weights by name, biases as [E, 2, F] and [E, 1, D]."""
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


def cost(rows: int, operands: Mapping[str, Array], expert_reads: int) -> pl.CostEstimate:
    """What XLA's scheduler should assume: every row is used, ``expert_reads`` experts' weights are read."""
    experts, _, f, d = operands["gate_up"].shape
    weight_bytes = sum(w.size * w.dtype.itemsize for w in operands.values()) // experts
    row_bytes = rows * d * (operands["gate_up"].dtype.itemsize + 4)
    return pl.CostEstimate(
        flops=6 * rows * d * f,
        transcendentals=rows * f,
        bytes_accessed=expert_reads * weight_bytes + row_bytes,
    )
