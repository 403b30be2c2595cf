"""The stacked weights of a layer's routed experts, and the rows-by-expert computation over them."""

from dataclasses import dataclass, replace

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import PartitionSpec
from jaxtyping import Float
from jmoe_kernels.choice import Kernels
from jmoe_kernels.grouped_mlp import COMBINED, Activation, ExpertWeights, Implementation, grouped_mlp
from jmoe_kernels.rows import take_rows

from jmoe.config.model import ModelConfig
from jmoe.mesh import EXPERT, TENSOR
from jmoe.moe.types import DispatchPlan
from jmoe.param import HOST, ParamMaker

# The mesh axes of an expert's own dimensions: gate and up, down, and the biases of both.
WITHIN = (None, TENSOR, None), (None, TENSOR), (None, TENSOR), (None,)


def weight_specs(like: ExpertWeights, *front: str | tuple[str, ...] | None) -> ExpertWeights:
    """How stacks of experts are split. ``front`` gives the mesh axes of the dimensions before an expert's own
    dimensions. The result is None for a weight that is None in ``like``."""
    every = like.gate_up_E2FD, like.down_EDF, like.gate_up_bias_E2F, like.down_bias_ED
    specs = (PartitionSpec(*front, *within) for within in WITHIN)
    return ExpertWeights(*(None if a is None else spec for a, spec in zip(every, specs, strict=True)))  # pyright: ignore[reportArgumentType]


class Experts(nnx.Module):
    """Weights of E gated experts in Hugging Face's ``[out, in]`` layout, gate and up stacked.

    gate_up_E2FD: ``[experts, (gate, up), inner, model]``.
    down_EDF: ``[experts, model, inner]``.
    gate_up_bias_E2F: ``[experts, (gate, up), inner]``; None without biases.
    down_bias_ED: ``[experts, model]``; None without biases.
    """

    def __init__(self, cfg: ModelConfig, make: ParamMaker):
        experts, model, inner = cfg.num_experts, cfg.hidden_size, cfg.moe_intermediate_size
        gate_up, down, gate_up_bias, down_bias = ((EXPERT, *within) for within in WITHIN)
        self.gate_up_E2FD = make.stored((experts, 2, inner, model), gate_up)
        self.down_EDF = make.stored((experts, model, inner), down)
        biased = cfg.expert_bias
        self.gate_up_bias_E2F = make((experts, 2, inner), gate_up_bias) if biased else None
        self.down_bias_ED = make((experts, model), down_bias) if biased else None

    @property
    def weights(self) -> ExpertWeights:
        biases = (None if p is None else p[...] for p in (self.gate_up_bias_E2F, self.down_bias_ED))
        return ExpertWeights(self.gate_up_E2FD[...], self.down_EDF[...], *biases)

    @property
    def specs(self) -> ExpertWeights:
        """How the weights are split over the mesh."""
        return weight_specs(self.weights, EXPERT)


class HostExperts(nnx.Module):
    """The experts of all L MoE layers, ``[layers, experts, ...]``, in the memory of the host (``HOST``)."""

    def __init__(self, cfg: ModelConfig, make: ParamMaker):
        both = len(cfg.moe_layers), cfg.num_experts
        model, inner = cfg.hidden_size, cfg.moe_intermediate_size
        gate_up, down, gate_up_bias, down_bias = ((None, EXPERT, *within) for within in WITHIN)
        self.gate_up_LE2FD = make.stored((*both, 2, inner, model), gate_up, memory=HOST)
        self.down_LEDF = make.stored((*both, model, inner), down, memory=HOST)
        biases = ((*both, 2, inner), gate_up_bias), ((*both, model), down_bias)
        made = [make.stored(*bias, memory=HOST) if cfg.expert_bias else None for bias in biases]
        self.gate_up_bias_LE2F, self.down_bias_LED = made

    @property
    def weights(self) -> ExpertWeights:
        """The weights with one more leading axis (layers) than the field names of ``ExpertWeights`` say."""
        biases = (None if p is None else p[...] for p in (self.gate_up_bias_LE2F, self.down_bias_LED))
        return ExpertWeights(self.gate_up_LE2FD[...], self.down_LEDF[...], *biases)


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
