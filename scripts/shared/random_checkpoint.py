"""Writes checkpoints with random weights in the shape of a TOML of sizes.

No import of this module loads jax, so that cores can be pinned before jax is imported.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def checkpoint(model: str, gate_scale: float = 1.0) -> Iterator[Path]:
    """Yields the directory of ``model``. For a TOML of sizes, it is a temporary one with random weights."""
    from jmoe.engine.deployment.settings import model_directory

    directory = model_directory(model)
    if directory.suffix != ".toml":
        yield directory
        return
    with tempfile.TemporaryDirectory() as temporary:
        write_random(directory, Path(temporary), gate_scale)
        yield Path(temporary)


def write_random(toml: Path, directory: Path, gate_scale: float = 1.0) -> None:
    """Writes a Hugging Face checkpoint of the shape in ``toml``.

    Its weights are normal with a standard deviation of 0.02, times ``gate_scale`` for the gates. Its norms
    are ones.
    """
    import jax.numpy as jnp
    from flax import nnx

    from jmoe.checkpoint.hf.writer import save_hf
    from jmoe.config.model import ModelConfig
    from jmoe.config.moe import MoEConfig
    from jmoe.config.reading import read_toml
    from jmoe.mesh import make_mesh
    from jmoe.models.decoder import Decoder, make_blueprint
    from jmoe.param import ParamMaker

    cfg = ModelConfig.from_dict(read_toml(toml))
    make = ParamMaker(jnp.dtype(cfg.dtype), nnx.Rngs(0), platform="cpu")
    model = Decoder(make_blueprint(cfg, MoEConfig(), make_mesh()), make)
    if gate_scale != 1:
        for layer in model.layers:
            assert layer.moe is not None
            gate_ED = layer.moe.router.gate_ED
            gate_ED[...] = gate_ED[...] * gate_scale
    save_hf(model, hf_config(cfg), directory)


FAMILIES = {  # architecture: model_type, the config's names of the experts and their inner dimension
    "MixtralForCausalLM": ("mixtral", "num_local_experts", "intermediate_size"),
    "OlmoeForCausalLM": ("olmoe", "num_experts", "intermediate_size"),
    "Qwen3MoeForCausalLM": ("qwen3_moe", "num_experts", "moe_intermediate_size"),
}
SAME = (  # fields with the same name in ModelConfig and in these families' config.json
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "num_experts_per_tok", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    "attention_bias", "clip_qkv", "sliding_window", "hidden_act", "dtype", "bos_token_id",
)  # fmt: skip


def hf_config(cfg: Any) -> dict[str, Any]:
    """Returns the ``config.json`` of a ModelConfig.

    It has only the fields of the family, because transformers refuses others. Raises ValueError for a family
    that has no entry in ``FAMILIES``.
    """
    if cfg.architecture not in FAMILIES:
        raise ValueError(f"{cfg.architecture} has no random checkpoint here; {', '.join(FAMILIES)} have")
    model_type, experts, inner = FAMILIES[cfg.architecture]
    return {
        **{name: getattr(cfg, name) for name in SAME},
        "architectures": [cfg.architecture],
        "model_type": model_type,
        experts: cfg.num_experts,
        inner: cfg.moe_intermediate_size,
        "use_sliding_window": cfg.sliding_window is not None,
        "norm_topk_prob": cfg.router.norm_topk_prob,
        "rope_theta": cfg.rope.rope_theta,
        "eos_token_id": list(cfg.eos_token_ids) or None,
    }
