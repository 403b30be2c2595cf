"""Grouped gated MLP on TPU (Pallas, Mosaic): sizes are data, weights stay as they are in checkpoints.

Axes: as in ``grouped_mlp``, and M rows of one window or block; T tiles and C cores in ``prefill``, C cores in
``decode``. A name that ends in ``_hbm`` is in HBM, other references are in VMEM or SMEM.
"""

from typing import get_args

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from jmoe_kernels.grouped_mlp.pallas_tpu.blocks import CHIPS, LANES, BlockSizes, choose_blocks, device_kind
from jmoe_kernels.grouped_mlp.pallas_tpu.decode import decode
from jmoe_kernels.grouped_mlp.pallas_tpu.prefill import prefill
from jmoe_kernels.grouped_mlp.types import ExpertWeights
from jmoe_kernels.quantised import as_float
from jmoe_kernels.settings import Activation

__all__ = ["BlockSizes", "choose_blocks", "grouped_mlp_pallas_tpu", "limit"]


def limit(
    weights: ExpertWeights, rows: int, activation: Activation, blocks: BlockSizes | None = None
) -> str | None:
    """Returns why the kernels cannot run, with the limit that is exceeded, or None if they can.

    It reads shapes and dtypes only.
    """
    _, inner, model = weights.dims
    if activation not in get_args(Activation):
        return f"activation {activation!r} is unknown; known: {', '.join(get_args(Activation))}"
    if coding := next(filter(None, weights.codings), None):
        return f"weights are quantised ({coding}); the kernels take bfloat16 and float32"
    if weights.dtype not in (jnp.bfloat16, jnp.float32):
        return f"weights are {weights.dtype}; the kernels take bfloat16 and float32"
    if weights.down_EDF.dtype != weights.gate_up_E2FD.dtype:
        return (
            f"gate_up is {weights.gate_up_E2FD.dtype} and down {weights.down_EDF.dtype}; they must be equal"
        )
    for name, size in (("model", model), ("inner", inner)):
        if size % LANES:
            return f"{name} dimension {size} is not a multiple of {LANES}"
    if rows == 0:
        return None
    kind = device_kind()
    blocks = blocks or choose_blocks(weights.dims, rows, weights.dtype, kind)
    if inner % blocks.inner or blocks.inner % LANES:
        return f"blocks.inner {blocks.inner} is not a multiple of {LANES} that divides {inner}"
    if blocks.kernel == "decode" and blocks.rows < rows:
        return f"blocks.rows {blocks.rows} is less than the {rows} rows that decode keeps in VMEM"
    need, most = blocks.vmem_bytes(model, weights.dtype.itemsize), CHIPS.get(kind, CHIPS["default"]).vmem
    if need > most:
        return f"{need} bytes of VMEM are needed and {most} allowed on {kind!r} ({blocks})"
    return None


def grouped_mlp_pallas_tpu(
    x_ND: Float[Array, "N D"],
    weights: ExpertWeights,
    group_sizes_E: Int[Array, " E"],
    *,
    activation: Activation = "silu",
    interpret: bool | pltpu.InterpretParams = False,
    blocks: BlockSizes | None = None,
) -> Float[Array, "N D"]:
    """Computes ``down(act(gate x) * up x)`` of each row's expert in float32.

    x_ND: rows sorted by expert. They are rounded to the weights' dtype here, as the inner activations are
        before the down product; accumulation is float32.
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
    blocks = blocks or choose_blocks(weights.dims, x_ND.shape[0], weights.dtype)
    operands = {"gate_up": as_float(weights.gate_up_E2FD), "down": as_float(weights.down_EDF)}
    if weights.gate_up_bias_E2F is not None:
        operands["gate_up_bias"] = weights.gate_up_bias_E2F
    if weights.down_bias_ED is not None:
        operands["down_bias"] = weights.down_bias_ED[:, None, :]  # a DMA takes whole rows of tiles only
    run = decode if blocks.kernel == "decode" else prefill
    sizes_E = group_sizes_E.astype(jnp.int32)
    return run(
        x_ND.astype(weights.dtype), operands, sizes_E, blocks, activation=activation, interpret=interpret
    )
