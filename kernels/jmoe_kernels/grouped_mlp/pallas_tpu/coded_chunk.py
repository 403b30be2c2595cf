"""The work of both TPU kernels on a chunk of an expert's quantised weights (see ``codes`` for the rows).

Partial products of a group of K are scaled and summed in float32. The groups of a chunk are straight-line
code: the compiler hides more latency in it than in a loop, although it spills registers.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jmoe_kernels.grouped_mlp.pallas_tpu.blocks import BlockSizes
from jmoe_kernels.grouped_mlp.pallas_tpu.chunk import add_rows, over_columns
from jmoe_kernels.grouped_mlp.pallas_tpu.codes import (
    LANES,
    TILE,
    joined,
    row_scales,
    stacked,
    sums_of,
    terms_of,
)
from jmoe_kernels.grouped_mlp.pallas_tpu.operands import Ref
from jmoe_kernels.grouped_mlp.types import gated
from jmoe_kernels.settings import Activation


def coded_scratch(blocks: BlockSizes, dtype: jnp.dtype) -> list:
    """Returns the shapes of what one window needs: gate, h, its codes, its scales and its sums."""
    rows = max(blocks.windows)
    wide = pltpu.VMEM((rows, blocks.inner), jnp.float32)
    codes = pltpu.VMEM((rows * blocks.form.terms, blocks.inner), dtype)
    return [wide, wide, codes, pltpu.VMEM((rows, LANES), jnp.float32), pltpu.VMEM((rows, LANES), jnp.float32)]


def coded_mlp(
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
    """Adds one chunk's share of the expert's output to those rows of a window that are ``mine``; the
    arguments are those of ``chunk_mlp``."""
    gate_MF, h_MF, codes_PF, scales_ML, sums_ML = scratch
    terms, own = blocks.form.terms, pl.ds(0, window.size)
    _, model, inner = chunk["gate_up"].shape
    terms_of_window = pl.ds(pl.multiple_of(window.start * terms, TILE), window.size * terms)

    def gate_up(columns: Any) -> None:
        def half(i: int) -> Array:
            weights = {name: ref.at[i] for name, ref in chunk.items() if name.startswith("gate_up")}
            product = _product(rows["x"].at[terms_of_window, :], weights, "gate_up", columns, terms)
            product = product * rows["scales"][window, :][:, :1]
            if "gate_up_lows" in weights:
                product = product + _of_lows(rows["sums"][window, :], weights["gate_up_lows"], columns)
            if "gate_up_bias" in chunk:
                product = product + chunk["gate_up_bias"][i : i + 1, columns].astype(jnp.float32)
            return product

        gate_MF[own, columns] = half(0)
        up = half(1)
        h_MF[own, columns] = gated(activation, gate_MF[own, columns], up)

    def encode(i: Array, _: None) -> None:
        block = pl.ds(pl.multiple_of(i * (TILE // terms), TILE // terms), TILE // terms)
        h = h_MF[block, :]
        scales, factor = row_scales(h, codes_PF.dtype, terms)
        parts = terms_of(h, factor, codes_PF.dtype, terms)
        codes_PF[pl.ds(pl.multiple_of(i * TILE, TILE), TILE), :] = stacked(parts, codes_PF.dtype)
        scales_ML[block, :] = jnp.broadcast_to(scales, (TILE // terms, LANES))
        if "down_lows" in chunk:
            sums_ML[block, :] = sums_of(h, chunk["down_lows"].shape[0])

    def down(columns: Any) -> None:
        codes = codes_PF.at[pl.ds(0, window.size * terms), :]
        y = _product(codes, chunk, "down", columns, terms) * scales_ML[own, :][:, :1]
        if "down_lows" in chunk:
            y = y + _of_lows(sums_ML[own, :], chunk["down_lows"], columns)
        add_rows(y_ND, y, chunk, window, columns, mine_M1, first)

    gate_columns, down_columns = blocks.columns(window.size, model)
    over_columns(inner, gate_columns, gate_up)
    lax.fori_loop(0, window.size * terms // TILE, encode, None)
    over_columns(model, down_columns, down)


def _product(codes_PK: Ref, weights: Mapping[str, Ref], name: str, columns: Any, terms: int) -> Array:
    """Returns the products of rows with columns of a weight, in units of the rows' scales."""
    weight, scales = weights[name], weights[f"{name}_scales"]
    groups, is_float = scales.shape[0], codes_PK.dtype == jnp.float8_e4m3fn
    depth, total = codes_PK.shape[1] // groups, None
    for g in range(groups):
        k = pl.ds(g * depth, depth)
        operand = weight[k, columns]
        product = lax.dot_general(
            codes_PK[:, k],
            operand if is_float else operand.astype(jnp.int8),
            (((1,), (0,)), ((), ())),
            preferred_element_type=jnp.float32 if is_float else jnp.int32,
        )
        scaled = joined(product, terms, depth) * scales[g, :, columns]
        total = scaled if total is None else total + scaled
    assert total is not None, "a weight has a group"
    return total


def _of_lows(sums_ML: Array, lows: Ref, columns: Any) -> Array:
    """Returns what the lows of groups add to the products of rows."""
    each = (sums_ML[:, g : g + 1] * lows[g, :, columns] for g in range(lows.shape[0]))
    total = next(each)
    for part in each:
        total = total + part
    return total
