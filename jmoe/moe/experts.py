"""The stacked weights of a layer's routed experts, and the rows-by-expert computation over them."""

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec
from jaxtyping import Float
from jmoe_kernels.grouped_mlp import ExpertWeights, Implementation, grouped_mlp
from jmoe_kernels.grouped_mlp.cpu import combined_mlp_cpu
from jmoe_kernels.rows import take_rows

from jmoe.mesh import EXPERT, TENSOR
from jmoe.moe.types import DispatchPlan
from jmoe.nn.param import HOST, ParamMaker


class Experts(nnx.Module):
    """Weights of E SwiGLU experts in Hugging Face's ``[out, in]`` layout, gate and up stacked.

    gate_up_E2FD: ``[experts, (gate, up), inner, model]``. down_EDF: ``[experts, model, inner]``.
    """

    def __init__(self, experts: int, model: int, inner: int, make: ParamMaker):
        self.gate_up_E2FD = make.stored((experts, 2, inner, model), (EXPERT, None, TENSOR, None))
        self.down_EDF = make.stored((experts, model, inner), (EXPERT, None, TENSOR))

    @property
    def weights(self) -> ExpertWeights:
        return ExpertWeights(self.gate_up_E2FD[...], self.down_EDF[...])

    @property
    def specs(self) -> ExpertWeights:
        """How they are split, as the parameters declare it."""
        gate_up, down = (PartitionSpec(*p.get_metadata("axes")) for p in (self.gate_up_E2FD, self.down_EDF))
        return ExpertWeights(gate_up, down)  # pyright: ignore[reportArgumentType]


class HostExperts(nnx.Module):
    """The experts of all L layers, ``[layers, experts, ...]``, in the memory of the host (``HOST``)."""

    def __init__(self, layers: int, experts: int, model: int, inner: int, make: ParamMaker):
        gate_up, down = (layers, experts, 2, inner, model), (layers, experts, model, inner)
        self.gate_up_LE2FD = make.stored(gate_up, (None, EXPERT, None, TENSOR, None), memory=HOST)
        self.down_LEDF = make.stored(down, (None, EXPERT, None, TENSOR), memory=HOST)

    @property
    def weights(self) -> ExpertWeights:
        """With one axis in front more than its names say."""
        return ExpertWeights(self.gate_up_LE2FD[...], self.down_LEDF[...])


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
