"""Qwen2-MoE (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): a shared expert that is weighted by its own gate."""

from collections.abc import Iterator
from functools import partial

from jmoe.config.model import LayerType, ModelConfig
from jmoe.models.family import Family, HFConfig, qwen_fields, require
from jmoe.models.names import decoder_names, mlp_names, qwen_experts
from jmoe.models.weights import StoredTensor

# defaults of transformers' Qwen2MoeConfig for absent fields of config.json (sizes of weights are required)
DEFAULTS = {
    "num_key_value_heads": 16,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "intermediate_size": 5632,
    "shared_expert_intermediate_size": 5632,
    "qkv_bias": True,
}


def config(hf: HFConfig) -> ModelConfig:
    hf = hf.with_defaults(DEFAULTS)
    fields = qwen_fields(hf)
    windowed = fields["sliding_window"] is not None
    return ModelConfig(
        "Qwen2MoeForCausalLM",
        **fields,
        shared_expert_intermediate_size=require(hf, "shared_expert_intermediate_size"),
        shared_expert_gate=True,
        qkv_bias=bool(hf["qkv_bias"]),
        layer_types=_layer_types(hf, fields["num_hidden_layers"]) if windowed else (),
    )


def _layer_types(hf: HFConfig, layers: int) -> tuple[LayerType, ...]:
    """Returns the type of each layer. By default every other layer of the first ``max_window_layers`` has a
    window, as in transformers."""
    kinds: tuple[LayerType, ...] = "full_attention", "sliding_attention"
    full = require(hf, "max_window_layers")
    own: list[LayerType] = [kinds[i % 2 == 0 and i < full] for i in range(layers)]
    return tuple(hf.get("layer_types") or own)


def experts(cfg: ModelConfig, hf_prefix: str, prefix: str) -> Iterator[StoredTensor]:
    yield from qwen_experts(cfg, hf_prefix, prefix)
    yield from mlp_names(f"{hf_prefix}.mlp.shared_expert", f"{prefix}.shared")
    yield StoredTensor(f"{hf_prefix}.mlp.shared_expert_gate.weight", f"{prefix}.shared.share_1D")


FAMILY = Family("Qwen2MoeForCausalLM", config, partial(decoder_names, experts=experts))
