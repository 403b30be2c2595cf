"""A layer's router: the weights that score its experts."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int
from jmoe_kernels.matmul import Dense, linear

from jmoe.config.model import ModelConfig
from jmoe.moe.routing import route
from jmoe.moe.types import Routing
from jmoe.param import ParamMaker


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RouterWeights:
    """The weights of one router.

    gate_ED: ``[experts, model]``.
    bias_E: added to the logits (see ``RouterConfig``).
    correction_E: added to the scores for the choice only (see ``RouterConfig``).
    expert_E: each expert's id in the checkpoint; present if the router chooses groups of experts, because
        experts may be renumbered.
    """

    gate_ED: Float[Array, "E D"]
    bias_E: Float[Array, " E"] | None = None
    correction_E: Float[Array, " E"] | None = None
    expert_E: Int[Array, " E"] | None = None


class Router(nnx.Module):
    def __init__(self, cfg: ModelConfig, make: ParamMaker):
        experts = cfg.num_experts
        self.gate_ED = make((experts, cfg.hidden_size), (None, None), keeps=True)
        self.bias_E = make((experts,), (None,)) if cfg.router.bias else None
        self.correction_E = make.exact((experts,), (None,)) if cfg.router.correction_bias else None
        self.expert_E = make.numbers(experts) if cfg.router.n_group > 1 else None

    @property
    def weights(self) -> RouterWeights:
        rest = (self.bias_E, self.correction_E, self.expert_E)
        return RouterWeights(self.gate_ED[...], *(None if p is None else p[...] for p in rest))


def router_logits(x_TD: Float[Array, "T D"], weights: RouterWeights, dense: Dense) -> Float[Array, "T E"]:
    logits_TE = linear(x_TD, weights.gate_ED, dense)
    if weights.bias_E is None:
        return logits_TE
    return logits_TE + weights.bias_E.astype(jnp.float32)[None]


def choose(logits_TE: Float[Array, "T E"], weights: RouterWeights, cfg: ModelConfig) -> Routing:
    """The router's own choice."""
    k, by = cfg.num_experts_per_tok, (weights.correction_E, weights.expert_E)
    return route(logits_TE, k, cfg.router, *by)
