"""The work of both TPU kernels on a chunk of an expert's plain weights and the rows that are in VMEM."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jmoe_kernels.grouped_mlp.pallas_tpu.blocks import LANES, ROW_ALIGN, BlockSizes
from jmoe_kernels.grouped_mlp.pallas_tpu.operands import Ref
from jmoe_kernels.grouped_mlp.types import gated
from jmoe_kernels.settings import Activation


def dot_nt(a_MK: Array, b_NK: Array) -> Array:
    """Returns ``a @ b.T`` with float32 accumulation; float32 operands are not rounded to bfloat16."""
    precision = lax.Precision.HIGHEST if b_NK.dtype == jnp.float32 else None
    dims = (((1,), (1,)), ((), ()))
    return lax.dot_general(a_MK, b_NK, dims, precision=precision, preferred_element_type=jnp.float32)


def plain_scratch(blocks: BlockSizes, dtype: jnp.dtype) -> list:
    """Returns the shapes of what one window needs: the float32 gate and the inner activations."""
    shape = (max(blocks.windows), blocks.inner)
    return [pltpu.VMEM(shape, jnp.float32), pltpu.VMEM(shape, dtype)]


def over_columns(total: int, width: int, visit: Callable[[Any], None]) -> None:
    """Calls ``visit`` on slices of ``width`` columns, then on the rest; a loop keeps few registers live."""
    full, rest = divmod(total, width)
    if full == 1:
        visit(pl.ds(0, width))
    else:
        block = lambda i, _: visit(pl.ds(pl.multiple_of(i * width, LANES), width))  # noqa: E731
        lax.fori_loop(0, full, block, None)
    if rest:
        visit(pl.ds(full * width, rest))


def chunk_mlp(
    rows: Mapping[str, Ref],
    y_ND: Ref,
    scratch: list[Ref],
    chunk: Mapping[str, Ref],
    window: Any,
    mine_M1: Array,
    *,
    blocks: BlockSizes,
    activation: Activation,
    first: Array,
) -> None:
    """Adds one chunk's share of the expert's output to those rows of a window that are ``mine``.

    rows: "x", the inputs in the weights' dtype.
    y_ND: float32 sums.
    scratch: float32 gate and inner activations of one window.
    window: slice of the window's rows.
    mine_M1: mask of the rows that belong to the expert.
    first: whether this is the expert's first chunk, which adds the down bias.

    gate goes through VMEM: with gate and up both in registers the compiler spills.
    """
    x_ND, (gate_MF, h_MF) = rows["x"], scratch
    _, inner, model = chunk["gate_up"].shape
    own = pl.ds(0, window.size)

    def gate_up(columns: Any) -> None:
        gate_MF[own, columns] = dot_nt(x_ND[window, :], chunk["gate_up"][0, columns, :])
        up = dot_nt(x_ND[window, :], chunk["gate_up"][1, columns, :])
        gate = gate_MF[own, columns]
        if "gate_up_bias" in chunk:
            gate = gate + chunk["gate_up_bias"][0:1, columns].astype(jnp.float32)
            up = up + chunk["gate_up_bias"][1:2, columns].astype(jnp.float32)
        h_MF[own, columns] = gated(activation, gate, up).astype(h_MF.dtype)

    def down(columns: Any) -> None:
        y = dot_nt(h_MF[own, :], chunk["down"][columns, :])
        add_rows(y_ND, y, chunk, window, columns, mine_M1, first)

    gate_columns, down_columns = blocks.columns(window.size, model)
    over_columns(inner, gate_columns, gate_up)
    over_columns(model, down_columns, down)


def add_rows(
    y_ND: Ref, y: Array, chunk: Mapping[str, Ref], window: Any, columns: Any, mine_M1: Array, first: Array
) -> None:
    """Adds ``y``, and with the first chunk the down bias, to columns of those rows of a window that are
    ``mine``."""
    if "down_bias" in chunk:
        bias = chunk["down_bias"][:, columns].astype(jnp.float32)
        y = y + jnp.where(first, bias, jnp.zeros_like(bias))
    old = y_ND[window, columns]
    y_ND[window, columns] = jnp.where(mine_M1, old + y, old)


def over_windows(start: Array, end: Array, blocks: BlockSizes, visit: Callable[[Any, Array], None]) -> None:
    """Calls ``visit(slice, mine)`` on windows that cover rows [start, end).

    Each row is ``mine`` in exactly one window. Windows start at a multiple of the form's tile at or below
    ``start``. A window that would run past the buffer is moved back, and leaves out the rows that its
    predecessor has done. Rows of other experts in a window are computed too and dropped by a select, never by
    a product with zero, because they may be NaN.
    """
    (large, small), align = blocks.windows, blocks.form.align
    base = start // align * align
    n_large = jnp.maximum(end - base - small + large - 1, 0) // large

    def window(first_row: Array, size: int) -> None:
        start_row = jnp.minimum(first_row, blocks.rows - size)
        row_M1 = start_row + lax.broadcasted_iota(jnp.int32, (size, 1), 0)
        mine_M1 = (row_M1 >= jnp.maximum(first_row, start)) & (row_M1 < end)
        visit(pl.ds(pl.multiple_of(start_row, align), size), mine_M1)

    lax.fori_loop(0, n_large, lambda i, _: window(base + i * large, large), None)
    pl.when(base + n_large * large < end)(lambda: window(base + n_large * large, small))


def fill_zero(ref: Ref) -> None:
    """Zeros ``ref`` block by block, because one store of the whole of it would be unrolled."""
    rows = ref.shape[0]

    def block(i: Array, _: None) -> None:
        ref[pl.ds(pl.multiple_of(i * ROW_ALIGN, ROW_ALIGN), ROW_ALIGN), :] = jnp.zeros(
            (ROW_ALIGN, ref.shape[1]), ref.dtype
        )

    lax.fori_loop(0, rows // ROW_ALIGN, block, None)
