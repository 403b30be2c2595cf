"""The forms of weights that the TPU kernels take: their sizes, their arrays, and the work on a chunk."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jmoe_kernels.grouped_mlp.pallas_tpu.blocks import BlockSizes, Form
from jmoe_kernels.grouped_mlp.pallas_tpu.chunk import chunk_mlp, plain_scratch
from jmoe_kernels.grouped_mlp.pallas_tpu.coded_chunk import coded_mlp, coded_scratch
from jmoe_kernels.grouped_mlp.pallas_tpu.codes import TILE, split_rows
from jmoe_kernels.grouped_mlp.pallas_tpu.operands import Operands, Stack
from jmoe_kernels.grouped_mlp.types import ExpertWeights
from jmoe_kernels.quantised import Coding, Quantised, as_float
from jmoe_kernels.settings import Activations

GROUPS = (32, 64, 128)  # tiles of eight-bit numbers are 32 deep, and a chunk of F is a multiple of 128


def why_not_coding(coding: Coding, inner: int) -> str | None:
    """Returns why the kernels cannot take a weight with rows of ``inner`` numbers, or None if they can."""
    if coding.group is None or (coding.group in GROUPS and inner % coding.group == 0):
        return None
    known = "whole groups of " + ", ".join(map(str, GROUPS[:-1])) + f" or {GROUPS[-1]}"
    return f"weights are quantised ({coding}); the kernels take {known}, or a scale a row"


def form_of(weights: ExpertWeights, activations: Activations = "auto") -> Form:
    """Returns the form of weights that the kernels take; it reads shapes and dtypes only."""
    gate_up, down = weights.gate_up_E2FD, weights.down_EDF
    if not isinstance(gate_up, Quantised) or not isinstance(down, Quantised):
        return Form.of_dtype(weights.dtype)
    both = gate_up, down
    names = {_product_of(weight.coding) for weight in both}
    unrounded = [weight for weight in both if why_unrounded(weight.coding) is not None]
    is_float, terms = "e4m3" in names, 1 if activations == "int8" and not unrounded else 2
    name = "e4m3" if is_float else "int4" if names == {"int4"} else "int8"
    _, inner, model = weights.dims
    bits = 8 * sum(w.coding.nbytes(w.shape, w.layout) for w in both) / (3 * inner * model * weights.dims[0])
    return Form(name, bits, terms, terms, TILE // terms, down.coding.group or 1)


def why_unrounded(coding: Coding) -> str | None:
    """Returns why activations are not rounded to int8 for a weight with this coding, or None if they are."""
    return "the TPU multiplies e4m3 with activations in two terms of e4m3" if coding.code == "e4m3" else None


def _product_of(coding: Coding) -> str:
    return coding.code if coding.code in ("int4", "e4m3") else "int8"


def operands_of(x_ND: Array, weights: ExpertWeights, blocks: BlockSizes) -> Operands:
    """Returns the arrays of a call. Rows are padded to a whole block of decode, or to whole tiles."""
    n, form = len(x_ND), blocks.form
    padded = blocks.rows if blocks.kernel == "decode" else -(-n // form.align) * form.align
    stacks = {
        "gate_up": _stacks("gate_up", weights.gate_up_E2FD, 2),
        "down": _stacks("down", weights.down_EDF, 2),
    }
    named = stacks["gate_up"] | stacks["down"]
    if weights.gate_up_bias_E2F is not None:
        named["gate_up_bias"] = Stack(weights.gate_up_bias_E2F, 2)
    if weights.down_bias_ED is not None:  # a DMA takes whole rows of tiles only
        named["down_bias"] = Stack(weights.down_bias_ED[:, None, :], None)
    if not form.is_coded:
        rows = {"x": x_ND.astype(weights.dtype)}
        if blocks.kernel == "decode":
            rows = {"x": jnp.pad(rows["x"], ((0, padded - n), (0, 0)))}
        return Operands(rows, named, n, weights.dims)
    lows = named.get("gate_up_lows")
    num_sums = None if lows is None else lows.array.shape[2]
    dtype = jnp.dtype(jnp.float8_e4m3fn if form.name == "e4m3" else jnp.int8)
    rows = split_rows(jnp.pad(x_ND, ((0, padded - n), (0, 0))), dtype, form.terms, num_sums)
    return Operands(rows, named, n, weights.dims)


def _stacks(name: str, weight: Array | Quantised, axis: int) -> dict[str, Stack]:
    """Returns the stacks of a weight, whose axis of F in a checkpoint's order is ``axis``."""
    if not isinstance(weight, Quantised):
        return {name: Stack(as_float(weight), axis)}
    values = weight.values
    if weight.coding.code == "e4m3" and values.dtype == jnp.uint8:
        values = lax.bitcast_convert_type(values, jnp.float8_e4m3fn)
    is_down = name == "down"
    whole = is_down and weight.coding.group is None
    groups_axis = None if whole else 1 if is_down else weight.ndim
    found = {
        name: Stack(values, 1 if is_down else weight.ndim - 1),
        f"{name}_scales": Stack(weight.scales, groups_axis),
    }
    return found if weight.lows is None else found | {f"{name}_lows": Stack(weight.lows, groups_axis)}


def mlp_of(form: Form) -> Callable[..., None]:
    """Returns the function that adds a chunk's share."""
    return coded_mlp if form.is_coded else chunk_mlp


def scratch_of(blocks: BlockSizes, dtype: Any) -> list:
    """Returns the shapes of what the function needs for one window.

    dtype: dtype of "x".
    """
    return coded_scratch(blocks, dtype) if blocks.form.is_coded else plain_scratch(blocks, dtype)
