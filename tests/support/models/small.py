"""A small model and meshes that many tests share."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jmoe.config.model import ModelConfig
from jmoe.config.moe import MoEConfig
from jmoe.mesh import Mesh, make_mesh
from jmoe.models.decoder import Decoder, make_blueprint
from jmoe.param import ParamMaker

MESHES = ((1, 1, 1), (1, 8, 1), (2, 4, 1), (1, 2, 4), (2, 2, 2), (8, 1, 1), (1, 1, 8), (4, 1, 2))


def config(**changes) -> ModelConfig:
    base = {
        "architecture": "Qwen3MoeForCausalLM",
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "max_position_embeddings": 128,
        "qk_norm": "head",
        "dtype": "float32",
    }
    return ModelConfig(**base | changes)


def decoder(cfg: ModelConfig, mesh: Mesh, moe: MoEConfig = MoEConfig(), seed: int = 0) -> Decoder:
    """Returns a decoder on ``mesh`` with random weights, so wide that no routing or argmax is a near tie."""
    model = Decoder(make_blueprint(cfg, moe, mesh), ParamMaker(jnp.dtype(cfg.dtype), nnx.Rngs(seed), std=0.3))
    graph, state = nnx.split(model)

    def place(param: nnx.Param) -> nnx.Param:
        spec = jax.sharding.PartitionSpec(*param.get_metadata("axes"))
        return param.replace(jax.device_put(param.get_value(), jax.sharding.NamedSharding(mesh, spec)))

    return nnx.merge(graph, jax.tree.map(place, state, is_leaf=lambda x: isinstance(x, nnx.Param)))


def mesh_of(shape: tuple[int, int, int]) -> Mesh:
    return make_mesh(*shape)


def tokens(cfg: ModelConfig, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, cfg.vocab_size, shape).astype(np.int32)
