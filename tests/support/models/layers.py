"""A layer of experts alone, and what it gives."""

import jax
import jax.numpy as jnp
from flax import nnx

from jmoe.config.moe import MoEConfig
from jmoe.models.decoder import make_blueprint
from jmoe.moe.layer import MoELayer
from jmoe.moe.types import TokenFlags
from jmoe.param import ParamMaker


def layer_on(mesh, cfg, moe=MoEConfig()) -> MoELayer:
    make = ParamMaker(jnp.dtype(cfg.dtype), nnx.Rngs(3), std=0.4)
    return MoELayer(make_blueprint(cfg, moe, mesh), make)


def run(layer, x, valid):
    """Returns the outputs of the tokens, and the statistics."""
    graph, state = nnx.split(layer)
    out = jax.jit(lambda s, x, v: nnx.merge(graph, s)(x, TokenFlags(v)))(state, x, valid)
    return out.y_TD, out.stats
