"""The oracle: every row through its own expert's MLP, in float32, one expert after the other."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


def grouped_mlp_reference(
    x_ND: Float[Array, "N D"],
    gate_up_E2FD: Float[Array, "E 2 F D"],
    down_EDF: Float[Array, "E D F"],
    group_sizes_E: Int[Array, " E"],
) -> Float[Array, "N D"]:
    """Rows sorted by expert through ``down(silu(gate x) * up x)``; rows past the last group are zero.

    O(E * N): for tests only.
    """
    ends_E = jnp.cumsum(group_sizes_E)
    starts_E = ends_E - group_sizes_E
    row_N = jnp.arange(x_ND.shape[0])
    y_ND = jnp.zeros(x_ND.shape, jnp.float32)
    for e in range(gate_up_E2FD.shape[0]):
        gate_FD, up_FD = gate_up_E2FD[e].astype(jnp.float32)
        x = x_ND.astype(jnp.float32)
        h_NF = jax.nn.silu(x @ gate_FD.T) * (x @ up_FD.T)
        mine_N1 = ((row_N >= starts_E[e]) & (row_N < ends_E[e]))[:, None]
        y_ND = y_ND + jnp.where(mine_N1, h_NF @ down_EDF[e].astype(jnp.float32).T, 0.0)
    return y_ND
