"""Qwen3-MoE (30B-A3B, 235B-A22B): query/key norm within each head, explicit head dimension."""

from collections.abc import Iterator

from jmoe.config import ModelConfig
from jmoe.models.family import Family, HFConfig, WeightName, common_fields, refuse, weight_names


def config(hf: HFConfig) -> ModelConfig:
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
