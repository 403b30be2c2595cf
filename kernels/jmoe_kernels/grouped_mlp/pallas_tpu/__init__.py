"""Grouped gated MLP on TPU (Pallas, Mosaic): sizes are data, weights stay as they are in checkpoints.

Axes: as in ``grouped_mlp``, and M rows of one window or block; T tiles and C cores in ``prefill``, C cores in
``decode``. A name that ends in ``_hbm`` is in HBM, other references are in VMEM or SMEM.
"""

from dataclasses import replace
from typing import get_args

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from jmoe_kernels.grouped_mlp.pallas_tpu.blocks import CHIPS, LANES, BlockSizes, choose_blocks, device_kind
from jmoe_kernels.grouped_mlp.pallas_tpu.decode import decode
from jmoe_kernels.grouped_mlp.pallas_tpu.forms import form_of, operands_of, why_not_coding, why_unrounded
from jmoe_kernels.grouped_mlp.pallas_tpu.prefill import prefill
from jmoe_kernels.grouped_mlp.types import ExpertWeights
from jmoe_kernels.quantised import Quantised
from jmoe_kernels.settings import Activation, Activations

__all__ = ["BlockSizes", "choose_blocks", "form_of", "grouped_mlp_pallas_tpu", "limit", "why_unrounded"]


def limit(
    weights: ExpertWeights, rows: int, activation: Activation, blocks: BlockSizes | None = None
) -> str | None:
    """Returns why the kernels cannot run, with the limit that is exceeded, or None if they can.

    It reads shapes and dtypes only.
    """
    _, inner, model = weights.dims
    if activation not in get_args(Activation):
        return f"activation {activation!r} is unknown; known: {', '.join(get_args(Activation))}"
    if any(weights.codings):
        reason = _why_not_quantised(weights)
        if reason is not None:
            return reason
    elif weights.dtype not in (jnp.bfloat16, jnp.float32):
        return f"weights are {weights.dtype}; the kernels take bfloat16 and float32"
    elif weights.down_EDF.dtype != weights.gate_up_E2FD.dtype:
        return (
            f"gate_up is {weights.gate_up_E2FD.dtype} and down {weights.down_EDF.dtype}; they must be equal"
        )
    for name, size in (("model", model), ("inner", inner)):
        if size % LANES:
            return f"{name} dimension {size} is not a multiple of {LANES}"
    if rows == 0:
        return None
    kind = device_kind()
    blocks = _blocks(blocks, weights, rows, "auto", kind)
    if inner % blocks.inner or blocks.inner % LANES:
        return f"blocks.inner {blocks.inner} is not a multiple of {LANES} that divides {inner}"
    if any(size % blocks.form.align for size in (*blocks.windows, blocks.rows)):
        return f"blocks.windows and rows must be multiples of {blocks.form.align}: {blocks}"
    if blocks.kernel == "decode" and blocks.rows < rows:
        return f"blocks.rows {blocks.rows} is less than the {rows} rows that decode keeps in VMEM"
    need, most = blocks.vmem_bytes(model), CHIPS.get(kind, CHIPS["default"]).vmem
    if need > most:
        return f"{need} bytes of VMEM are needed and {most} allowed on {kind!r} ({blocks})"
    return None


def _blocks(
    blocks: BlockSizes | None,
    weights: ExpertWeights,
    rows: int,
    activations: Activations,
    kind: str | None = None,
) -> BlockSizes:
    form = form_of(weights, activations)
    return choose_blocks(weights.dims, rows, form, kind) if blocks is None else replace(blocks, form=form)


def _why_not_quantised(weights: ExpertWeights) -> str | None:
    gate_up, down = weights.gate_up_E2FD, weights.down_EDF
    if not isinstance(gate_up, Quantised) or not isinstance(down, Quantised):
        return "one of gate_up and down is quantised; the kernels take both quantised or neither"
    if (gate_up.coding.code == "e4m3") != (down.coding.code == "e4m3"):
        return (
            f"gate_up is {gate_up.coding} and down {down.coding}; the kernels take e4m3 for both or neither"
        )
    for weight in (gate_up, down):
        if reason := why_not_coding(weight.coding, weight.shape[-1]):
            return reason
        if weight.layout != "columns":
            return f"quantised weights lie in the layout {weight.layout!r}; the kernels take 'columns'"
    return None


def grouped_mlp_pallas_tpu(
    x_ND: Float[Array, "N D"],
    weights: ExpertWeights,
    group_sizes_E: Int[Array, " E"],
    *,
    activation: Activation = "silu",
    interpret: bool | pltpu.InterpretParams = False,
    blocks: BlockSizes | None = None,
    activations: Activations = "auto",
) -> Float[Array, "N D"]:
    """Computes ``down(act(gate x) * up x)`` of each row's expert in float32.

    x_ND: rows sorted by expert. They are rounded to the weights' dtype here, or to codes with a scale for
        each row (see ``codes``), as the inner activations are before the down product; accumulation is
        float32.
    activations: what rows are rounded to for quantised weights of whole numbers: 16 bits, or int8.
    group_sizes_E: number of rows of each expert, int32, summing to at most N; they are data.
    interpret: whether to run in the interpreter, or its parameters.
    blocks: block sizes; None takes the table's (see ``blocks.py``).

    Rows past the last group come out zero, and what stands in x there is not used. Weights of experts without
    rows are not read. A row that is NaN makes no other row NaN.
    Raises ValueError with the reason that ``limit`` returns.
    """
    reason = limit(weights, x_ND.shape[0], activation, blocks)
    if reason is not None:
        raise ValueError(f"grouped_mlp_pallas_tpu: {reason}")
    if x_ND.shape[0] == 0:
        return jnp.zeros(x_ND.shape, jnp.float32)
    blocks = _blocks(blocks, weights, x_ND.shape[0], activations)
    run = decode if blocks.kernel == "decode" else prefill
    operands, sizes_E = operands_of(x_ND, weights, blocks), group_sizes_E.astype(jnp.int32)
    return run(operands, sizes_E, blocks, activation=activation, interpret=interpret)
