"""OLMoE (1B-7B): query/key norm over all heads together, top-k weights not renormalised by default."""

from collections.abc import Iterator

from jmoe.config import ModelConfig
from jmoe.models.family import Family, HFConfig, WeightName, common_fields, refuse, weight_names

# what transformers' OlmoeConfig has where config.json is silent (sizes of weights are required)
DEFAULTS: HFConfig = {
    "num_experts_per_tok": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "eos_token_id": 50279,
}


def config(hf: HFConfig) -> ModelConfig:
    hf = {**DEFAULTS, **hf}
    refuse(hf, "clip_qkv", hf.get("clip_qkv") is not None)
    return ModelConfig(
        architecture="OlmoeForCausalLM",
        **common_fields(hf, experts=("num_experts", "num_local_experts"), inner="intermediate_size"),
        norm_topk_prob=bool(hf.get("norm_topk_prob", False)),
        qk_norm="full",
        attention_bias=bool(hf.get("attention_bias", False)),
    )


def names(cfg: ModelConfig) -> Iterator[WeightName]:
    return weight_names(
        cfg, gate="mlp.gate", experts="mlp.experts", gate_up_down=("gate_proj", "up_proj", "down_proj")
    )


FAMILY = Family("OlmoeForCausalLM", config, names)
