"""Qwen3-MoE (30B-A3B, 235B-A22B): query/key norm within each head, explicit head dimension."""

from collections.abc import Iterator

from jmoe.config import ModelConfig
from jmoe.models.family import Family, HFConfig, WeightName, common_fields, refuse, weight_names

# what transformers' Qwen3MoeConfig has where config.json is silent (sizes of weights are required)
DEFAULTS: HFConfig = {
    "num_key_value_heads": 4,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "sliding_window": 4096,
}


def config(hf: HFConfig) -> ModelConfig:
    hf = {**DEFAULTS, **hf}
    refuse(hf, "mlp_only_layers", hf.get("mlp_only_layers"))
    refuse(hf, "decoder_sparse_step", hf.get("decoder_sparse_step", 1) != 1)
    windowed = hf.get("use_sliding_window", False)
    return ModelConfig(
        architecture="Qwen3MoeForCausalLM",
        **common_fields(hf, experts=("num_experts", "num_local_experts"), inner="moe_intermediate_size"),
        norm_topk_prob=bool(hf.get("norm_topk_prob", False)),
        qk_norm="head",
        attention_bias=bool(hf.get("attention_bias", False)),
        sliding_window=hf.get("sliding_window") if windowed else None,
    )


def names(cfg: ModelConfig) -> Iterator[WeightName]:
    return weight_names(
        cfg, gate="mlp.gate", experts="mlp.experts", gate_up_down=("gate_proj", "up_proj", "down_proj")
    )


FAMILY = Family("Qwen3MoeForCausalLM", config, names)
