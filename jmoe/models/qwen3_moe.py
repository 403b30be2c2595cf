"""Qwen3-MoE (30B-A3B, 235B-A22B): query/key norm within each head, explicit head dimension."""

from functools import partial

from jmoe.config.model import ModelConfig
from jmoe.models.family import Family, HFConfig, qwen_fields
from jmoe.models.names import decoder_names, qwen_experts

# defaults of transformers' Qwen3MoeConfig for absent fields of config.json (sizes of weights are required)
DEFAULTS = {
    "num_key_value_heads": 4,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "sliding_window": 4096,
    "intermediate_size": 6144,
}


def config(hf: HFConfig) -> ModelConfig:
    hf = hf.with_defaults(DEFAULTS)
    bias = bool(hf.get("attention_bias", False))
    return ModelConfig("Qwen3MoeForCausalLM", **qwen_fields(hf), qk_norm="head", attention_bias=bias)


FAMILY = Family("Qwen3MoeForCausalLM", config, partial(decoder_names, experts=qwen_experts))
