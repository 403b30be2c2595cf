"""The oracle: it runs every row through its own expert's MLP, in float32, one expert after another."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jmoe_kernels.grouped_mlp.types import ExpertWeights, gated
from jmoe_kernels.quantised import as_float
from jmoe_kernels.settings import Activation


def grouped_mlp_reference(
    x_ND: Float[Array, "N D"],
    weights: ExpertWeights,
    group_sizes_E: Int[Array, " E"],
    activation: Activation = "silu",
) -> Float[Array, "N D"]:
    """Computes ``down(act(gate x) * up x)`` of rows sorted by expert; rows past the last group are zero.

    It takes O(E * N), so it is for tests only.
    """
    ends_E = jnp.cumsum(group_sizes_E)
    starts_E = ends_E - group_sizes_E
    row_N = jnp.arange(x_ND.shape[0])
    x = x_ND.astype(jnp.float32)
    y_ND = jnp.zeros(x_ND.shape, jnp.float32)
    for e in range(weights.dims[0]):
        gate_FD, up_FD = as_float(weights.gate_up_E2FD[e]).astype(jnp.float32)
        gate, up = x @ gate_FD.T, x @ up_FD.T
        if weights.gate_up_bias_E2F is not None:
            gate_bias, up_bias = weights.gate_up_bias_E2F[e].astype(jnp.float32)
            gate, up = gate + gate_bias[None], up + up_bias[None]
        y = gated(activation, gate, up) @ as_float(weights.down_EDF[e]).astype(jnp.float32).T
        if weights.down_bias_ED is not None:
            y = y + weights.down_bias_ED[e].astype(jnp.float32)[None]
        mine_N1 = ((row_N >= starts_E[e]) & (row_N < ends_E[e]))[:, None]
        y_ND = y_ND + jnp.where(mine_N1, y, 0.0)
    return y_ND
