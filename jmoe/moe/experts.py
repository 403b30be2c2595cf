"""The stacked weights of a layer's routed experts, and the rows-by-expert computation over them."""

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float
from jmoe_kernels.grouped_mlp import ExpertWeights, Implementation, grouped_mlp
from jmoe_kernels.grouped_mlp.cpu import combined_mlp_cpu
from jmoe_kernels.rows import take_rows

from jmoe.mesh import EXPERT, TENSOR
from jmoe.moe.types import DispatchPlan
from jmoe.nn.param import ParamMaker


class Experts(nnx.Module):
    """Weights of E SwiGLU experts in Hugging Face's ``[out, in]`` layout, gate and up stacked.

    gate_up_E2FD: ``[experts, (gate, up), inner, model]``. down_EDF: ``[experts, model, inner]``.
    """

    def __init__(self, experts: int, model: int, inner: int, make: ParamMaker):
        self.gate_up_E2FD = make.stored((experts, 2, inner, model), (EXPERT, None, TENSOR, None))
        self.down_EDF = make.stored((experts, model, inner), (EXPERT, None, TENSOR))


def apply_experts(
    x_TD: Float[Array, "T D"],
    weights_TK: Float[Array, "T K"],
    plan: DispatchPlan,
    experts: ExpertWeights,
    implementation: Implementation,
    platform: str | None = None,
    capacity: int | None = None,
) -> Float[Array, "T D"]:
    """The weighted sum of each token's planned experts, float32; a token without any comes out zero."""
    if implementation == "cpu":  # gathers and combines on its way
        return combined_mlp_cpu(x_TD, weights_TK, plan.order_N, experts, plan.group_sizes_L)
    t, k = weights_TK.shape
    order_N, inverse_N = plan.order_N, plan.inverse_N
    rows_ND = grouped_mlp(
        take_rows(x_TD, order_N // k, inverse_N.reshape(t, k)), experts, plan.group_sizes_L,
        implementation=implementation, platform=platform, capacity=capacity,
    )  # fmt: skip
    chosen_ND = take_rows(rows_ND, inverse_N, order_N[:, None])
    return jnp.einsum("tkd,tk->td", chosen_ND.reshape(t, k, -1), weights_TK)
