"""OLMoE (1B-7B): query/key norm over all heads together, top-k weights not renormalised by default."""

from collections.abc import Iterator

from jmoe.config import ModelConfig
from jmoe.models.family import Family, HFConfig, WeightName, common_fields, refuse, weight_names


def config(hf: HFConfig) -> ModelConfig:
    refuse(hf, "clip_qkv", hf.get("clip_qkv") is not None)
    return ModelConfig(
        architecture="OlmoeForCausalLM",
        **common_fields(
            hf, experts=("num_experts", "num_local_experts"), inner="intermediate_size", eps=1e-5
        ),
        norm_topk_prob=bool(hf.get("norm_topk_prob", False)),
        qk_norm="full",
        attention_bias=bool(hf.get("attention_bias", False)),
    )


def names(cfg: ModelConfig) -> Iterator[WeightName]:
    return weight_names(
        cfg, gate="mlp.gate", experts="mlp.experts", gate_up_down=("gate_proj", "up_proj", "down_proj")
    )


FAMILY = Family("OlmoeForCausalLM", config, names)
