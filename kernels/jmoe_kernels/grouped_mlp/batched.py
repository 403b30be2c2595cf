"""Grouped MLP as one batched product over ``[E, C]`` padded rows: differentiable, for training."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jmoe_kernels.grouped_mlp.types import ExpertWeights, gated
from jmoe_kernels.matmul import linear
from jmoe_kernels.quantised import as_float
from jmoe_kernels.rows import take_rows
from jmoe_kernels.settings import Activation


def grouped_mlp_batched(
    x_ND: Float[Array, "N D"],
    weights: ExpertWeights,
    group_sizes_E: Int[Array, " E"],
    activation: Activation = "silu",
    *,
    max_rows: int | None = None,
) -> Float[Array, "N D"]:
    """Computes ``down(act(gate x) * up x)`` of rows sorted by expert, each padded to ``max_rows`` rows.

    max_rows: None means N, which is exact and takes E times the memory. A smaller number zeroes the rows
        beyond it, which training tolerates; the caller counts them as
        ``sum(max(group_sizes - max_rows, 0))``.
    """
    n = x_ND.shape[0]
    e, f, d = weights.dims
    c = n if max_rows is None else min(max_rows, n)
    starts_E = jnp.cumsum(group_sizes_E) - group_sizes_E
    row_N = jnp.arange(n)
    expert_N = jnp.searchsorted(jnp.cumsum(group_sizes_E), row_N, side="right")
    rank_N = row_N - starts_E.at[expert_N].get(mode="fill", fill_value=0)
    slot_N = jnp.where((expert_N < e) & (rank_N < c), expert_N * c + rank_N, e * c)
    rank_EC = jnp.arange(c)[None]
    row_EC = jnp.where(rank_EC < group_sizes_E[:, None], starts_E[:, None] + rank_EC, n).reshape(-1)

    x_ECD = take_rows(x_ND, row_EC, slot_N[:, None]).reshape(e, c, d)
    h_EC2F = linear(x_ECD, as_float(weights.gate_up_E2FD).reshape(e, 2 * f, d))
    if weights.gate_up_bias_E2F is not None:
        h_EC2F = h_EC2F + as_float(weights.gate_up_bias_E2F).reshape(e, 1, 2 * f).astype(jnp.float32)
    h_ECF = gated(activation, h_EC2F[..., :f], h_EC2F[..., f:])
    y_ECD = linear(h_ECF, as_float(weights.down_EDF))
    if weights.down_bias_ED is not None:
        y_ECD = y_ECD + as_float(weights.down_bias_ED)[:, None].astype(jnp.float32)
    return take_rows(y_ECD.reshape(-1, d), slot_N, row_EC[:, None])
