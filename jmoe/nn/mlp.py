"""A dense gated MLP: the MLP of layers without experts, and the shared expert that every token passes."""

import jax
from flax import nnx
from jax import Array, lax
from jax.sharding import PartitionSpec
from jaxtyping import Float
from jmoe_kernels.grouped_mlp import gated
from jmoe_kernels.quantised import Weight

from jmoe.blueprint import Blueprint
from jmoe.mesh import TENSOR, TOKENS, check_divides, is_single
from jmoe.param import ParamMaker, specs_of


class DenseMLP(nnx.Module):
    """A dense gated MLP. Weights are ``[out, in]``; the inner dimension is split over ``tensor``.

    gate_up_2FD: ``[(gate, up), inner, model]``.
    down_DF: ``[model, inner]``.
    share_1D: weights of a sigmoid of the token by which the whole output is multiplied (Qwen2-MoE); None
        unless ``shares``.
    """

    def __init__(self, blueprint: Blueprint, inner: int, make: ParamMaker, shares: bool = False):
        cfg, mesh = blueprint.cfg, blueprint.mesh
        check_divides("dense MLP inner size", inner, TENSOR, mesh.shape[TENSOR])
        self.gate_up_2FD = make.product((2, inner, cfg.hidden_size), (None, TENSOR, None))
        self.down_DF = make.product((cfg.hidden_size, inner), (None, TENSOR))
        self.share_1D = make((1, cfg.hidden_size), (None, None), has_own_dtype=True) if shares else None
        self.cfg, self.mesh, self.kernels = cfg, mesh, blueprint.kernels

    def __call__(self, x_TD: Float[Array, "T D"]) -> Float[Array, "T D"]:
        weights = {name: p[...] for name, p in nnx.state(self, nnx.Param).items()}
        if is_single(self.mesh):
            return self._shard(weights, x_TD)
        tokens = PartitionSpec(TOKENS)
        run = jax.shard_map(
            self._shard, mesh=self.mesh, in_specs=(specs_of(self), tokens), out_specs=tokens, check_vma=False
        )
        return run(weights, x_TD)

    def _shard(self, w: dict[str, Weight], x_TD: Array) -> Array:
        multiply = self.kernels.multiply
        gate_up = w["gate_up_2FD"]
        inner = gate_up.shape[1]
        rows = jax.tree.map(lambda array: array.reshape(2 * inner, array.shape[-1]), gate_up)
        h_TF = multiply(x_TD, rows)
        y_TD = multiply(gated(self.cfg.hidden_act, h_TF[:, :inner], h_TF[:, inner:]), w["down_DF"])
        if not is_single(self.mesh):
            y_TD = lax.psum(y_TD, TENSOR)
        return y_TD if self.share_1D is None else y_TD * jax.nn.sigmoid(multiply(x_TD, w["share_1D"]))
