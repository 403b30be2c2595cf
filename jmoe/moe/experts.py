"""The stacked weights of a layer's routed experts, and the rows-by-expert computation over them."""

from dataclasses import dataclass, replace

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Float
from jmoe_kernels.choice import Kernels
from jmoe_kernels.grouped_mlp import COMBINED, Activation, ExpertWeights, Implementation, grouped_mlp
from jmoe_kernels.rows import take_rows

from jmoe.config.model import ModelConfig
from jmoe.mesh import EXPERT, TENSOR
from jmoe.moe.expert_leaves import LEAVES, leaves_of, weight_specs
from jmoe.moe.types import DispatchPlan
from jmoe.param import HOST, ParamMaker


class Experts(nnx.Module):
    """Weights of E gated experts in Hugging Face's ``[out, in]`` layout, gate and up stacked: a parameter
    ``[experts, ...]`` for each leaf of ``LEAVES``, None if the model's experts do not have it."""

    def __init__(self, cfg: ModelConfig, make: ParamMaker):
        for leaf in LEAVES:
            shape, axes = (cfg.num_experts, *leaf.shape(cfg)), (EXPERT, *leaf.axes)
            make_leaf = make if leaf.is_bias else make.stored
            setattr(self, leaf.name, make_leaf(shape, axes) if leaf in leaves_of(cfg) else None)

    @property
    def weights(self) -> ExpertWeights:
        return ExpertWeights(*(_values(getattr(self, leaf.name)) for leaf in LEAVES))  # pyright: ignore[reportArgumentType]

    @property
    def specs(self) -> ExpertWeights:
        """How the weights are split over the mesh."""
        return weight_specs(self.weights, EXPERT)


class HostExperts(nnx.Module):
    """The experts of all L MoE layers, ``[layers, experts, ...]``, in the memory of the host (``HOST``)."""

    def __init__(self, cfg: ModelConfig, make: ParamMaker):
        both = len(cfg.moe_layers), cfg.num_experts
        for leaf in LEAVES:
            shape, axes = (*both, *leaf.shape(cfg)), (None, EXPERT, *leaf.axes)
            present = leaf in leaves_of(cfg)
            setattr(self, leaf.store_name, make.stored(shape, axes, memory=HOST) if present else None)

    @property
    def weights(self) -> ExpertWeights:
        """The weights with one more leading axis (layers) than the field names of ``ExpertWeights`` say."""
        return ExpertWeights(*(_values(getattr(self, leaf.store_name)) for leaf in LEAVES))  # pyright: ignore[reportArgumentType]


def _values(param: nnx.Param | None) -> Array | None:
    return None if param is None else param[...]


@dataclass(frozen=True)
class ApplyBy:
    """An ``Apply`` that uses the kernels of a model. parts: number of tensor ranks that share an expert."""

    kernels: Kernels
    activation: Activation
    weigh_input: bool
    parts: int = 1

    def __call__(
        self, x_TD: Array, weights_TK: Array, plan: DispatchPlan, experts: ExpertWeights
    ) -> Float[Array, "T D"]:
        experts = biased_once(experts, self.parts)
        return apply_experts(
            x_TD, weights_TK, plan, experts, self.kernels.experts, self.kernels.platform,
            activation=self.activation, weigh_input=self.weigh_input,
        )  # fmt: skip


def biased_once(experts: ExpertWeights, parts: int) -> ExpertWeights:
    """The weights with which this one of ``parts`` tensor ranks computes. The ranks' outputs are summed, so
    only the first rank keeps the bias of the down projection."""
    if experts.down_bias_ED is None or parts == 1:
        return experts
    first = lax.axis_index(TENSOR) == 0
    return replace(experts, down_bias_ED=jnp.where(first, experts.down_bias_ED, 0))


def apply_experts(
    x_TD: Float[Array, "T D"],
    weights_TK: Float[Array, "T K"],
    plan: DispatchPlan,
    experts: ExpertWeights,
    implementation: Implementation,
    platform: str | None = None,
    capacity: int | None = None,
    activation: Activation = "silu",
    weigh_input: bool = False,
) -> Float[Array, "T D"]:
    """The weighted sum of each token's planned experts, float32; zero for a token without any.

    weigh_input: the weight multiplies an expert's input; the outputs are then summed without weights.
    """
    if (combined := COMBINED.get(implementation)) and not weigh_input:
        return combined(x_TD, weights_TK, plan.order_N, experts, plan.group_sizes_L, activation)
    t, k = weights_TK.shape
    order_N, inverse_N = plan.order_N, plan.inverse_N
    given_ND = take_rows(x_TD, order_N // k, inverse_N.reshape(t, k))
    if weigh_input:
        given_ND = given_ND.astype(jnp.float32) * weights_TK.reshape(-1)[order_N][:, None]
        weights_TK = jnp.ones_like(weights_TK)
    rows_ND = grouped_mlp(
        given_ND, experts, plan.group_sizes_L,
        activation=activation, implementation=implementation, platform=platform, capacity=capacity,
    )  # fmt: skip
    chosen_ND = take_rows(rows_ND, inverse_N, order_N[:, None])
    return jnp.einsum("tkd,tk->td", chosen_ND.reshape(t, k, -1), weights_TK)
