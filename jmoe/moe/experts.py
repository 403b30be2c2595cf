"""The stacked weights of a layer's routed experts, and the rows-by-expert computation over them."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Bool, Float
from jmoe_kernels.grouped_mlp import IMPLEMENTATIONS, Activation, ExpertKernel, ExpertWeights, grouped_mlp
from jmoe_kernels.rows import take_rows
from jmoe_kernels.settings import Activations

from jmoe.config.model import ModelConfig
from jmoe.config.techniques import Phase
from jmoe.mesh import EXPERT, TENSOR
from jmoe.moe.expert_leaves import LEAVES, leaves_of, weight_specs
from jmoe.moe.types import Apply, Counts, DispatchPlan, ExpertOutput, LocalExperts, Routing, Send, Traffic
from jmoe.param import HOST, ParamMaker


class Experts(nnx.Module):
    """Weights of E gated experts in Hugging Face's ``[out, in]`` layout, gate and up stacked: a parameter
    ``[experts, ...]`` for each leaf of ``LEAVES``, None if the model's experts do not have it."""

    def __init__(self, cfg: ModelConfig, make: ParamMaker):
        for leaf in LEAVES:
            shape, axes = (cfg.num_experts, *leaf.shape(cfg)), (EXPERT, *leaf.axes)
            make_leaf = make if leaf.is_bias else make.in_storage_dtype
            setattr(self, leaf.name, make_leaf(shape, axes) if leaf in leaves_of(cfg) else None)

    @property
    def weights(self) -> ExpertWeights:
        return ExpertWeights(**{leaf.name: _values(getattr(self, leaf.name)) for leaf in LEAVES})  # pyright: ignore[reportArgumentType]

    @property
    def source(self) -> "ResidentExperts":
        return ResidentExperts(self.weights)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ResidentExperts:
    """The experts of a layer if all of them are on the devices; it is an ``ExpertSource``."""

    weights: ExpertWeights

    @property
    def specs(self) -> "ResidentExperts":
        return ResidentExperts(weight_specs(self.weights, EXPERT))

    @property
    def next_specs(self) -> None:
        return None

    @property
    def resident_E(self) -> None:
        return None

    def run(
        self,
        x_TD: Float[Array, "T D"],
        plain_routing: Routing,
        routing: Routing,
        valid_T: Bool[Array, " T"],
        phase: Phase,
        apply: Apply,
        send: Send,
    ) -> tuple[Float[Array, "T D"], Traffic, Counts, None]:
        """Runs the layer's experts on its tokens; there is nothing to count or to pass on."""
        y_TD, traffic = send(x_TD, routing, valid_T, apply.local_experts(self.weights))
        return y_TD, traffic, {}, None


class HostExperts(nnx.Module):
    """The experts of all L MoE layers, ``[layers, experts, ...]``, in the memory of the host (``HOST``)."""

    def __init__(self, cfg: ModelConfig, make: ParamMaker):
        both = len(cfg.moe_layers), cfg.num_experts
        for leaf in LEAVES:
            shape, axes = (*both, *leaf.shape(cfg)), (None, EXPERT, *leaf.axes)
            present = leaf in leaves_of(cfg)
            param = make.in_storage_dtype(shape, axes, memory=HOST) if present else None
            setattr(self, leaf.store_name, param)

    @property
    def weights(self) -> ExpertWeights:
        """The weights with one more leading axis (layers) than the field names of ``ExpertWeights`` say."""
        return ExpertWeights(**{leaf.name: _values(getattr(self, leaf.store_name)) for leaf in LEAVES})  # pyright: ignore[reportArgumentType]


def _values(param: nnx.Param | None) -> Array | None:
    return None if param is None else param.get_value()


@dataclass(frozen=True)
class ExpertMath:
    """The computation of experts on one rank; it is an ``Apply``.

    implementation: kernel of the grouped product.
    platform: platform that the kernel is compiled for; None is jax's default.
    activation: activation of the gate.
    weigh_input: whether a weight multiplies an expert's input, not its output.
    tensor_ranks: number of tensor ranks that share an expert.
    max_rows: rows of one expert in the training form; None computes all rows.
    activations: what a kernel that multiplies with codes rounds the other factor to.
    """

    implementation: ExpertKernel
    platform: str | None = None
    activation: Activation = "silu"
    weigh_input: bool = False
    tensor_ranks: int = 1
    max_rows: int | None = None
    activations: Activations = "auto"

    def __call__(
        self,
        x_TD: Float[Array, "T D"],
        weights_TK: Float[Array, "T K"],
        plan: DispatchPlan,
        experts: ExpertWeights,
    ) -> Float[Array, "T D"]:
        """Returns the weighted sum of each token's planned experts, float32; it is zero for a token without
        any."""
        experts = biased_once(experts, self.tensor_ranks)
        run_combined = IMPLEMENTATIONS[self.implementation].run_combined
        if run_combined is not None and not self.weigh_input:
            return run_combined(
                x_TD, weights_TK, plan.order_N, experts, plan.group_sizes_L, self.activation, self.activations
            )
        t, k = weights_TK.shape
        order_N, inverse_N = plan.order_N, plan.inverse_N
        input_ND = take_rows(x_TD, order_N // k, inverse_N.reshape(t, k))
        if self.weigh_input:
            input_ND = input_ND.astype(jnp.float32) * weights_TK.reshape(-1)[order_N][:, None]
            weights_TK = jnp.ones_like(weights_TK)
        rows_ND = self._run_rows(input_ND, plan.group_sizes_L, experts)
        chosen_ND = take_rows(rows_ND, inverse_N, order_N[:, None])
        return jnp.einsum("tkd,tk->td", chosen_ND.reshape(t, k, -1), weights_TK)

    def local_experts(self, experts: ExpertWeights) -> LocalExperts:
        """Returns the experts of one rank as a transport takes them."""
        biased = biased_once(experts, self.tensor_ranks)

        def run_tokens(x_TD: Array, weights_TJ: Array, plan: DispatchPlan) -> ExpertOutput:
            return ExpertOutput(self(x_TD, weights_TJ, plan, experts), plan.num_rows)

        def run_rows(rows_ND: Array, group_sizes_L: Array) -> ExpertOutput:
            y_ND = self._run_rows(rows_ND, group_sizes_L, biased)
            return ExpertOutput(y_ND, jnp.sum(group_sizes_L, dtype=jnp.int32))

        return LocalExperts(experts.dims[0], experts.dtype, run_tokens, run_rows, self.weigh_input)

    def _run_rows(self, rows_ND: Array, group_sizes_L: Array, biased: ExpertWeights) -> Array:
        return grouped_mlp(
            rows_ND, biased, group_sizes_L, activation=self.activation, max_rows=self.max_rows,
            implementation=self.implementation, platform=self.platform, activations=self.activations,
        )  # fmt: skip


def biased_once(experts: ExpertWeights, tensor_ranks: int) -> ExpertWeights:
    """Returns the weights with which one of ``tensor_ranks`` ranks computes. The ranks' outputs are summed,
    so only the first rank keeps the bias of the down projection."""
    if experts.down_bias_ED is None or tensor_ranks == 1:
        return experts
    first = lax.axis_index(TENSOR) == 0
    return replace(experts, down_bias_ED=jnp.where(first, experts.down_bias_ED, 0))
