"""GLM-4.5 (355B-A32B, Air): DeepSeek-V3's router over grouped-query attention, half of each head rotated."""

from jmoe.config.model import ModelConfig
from jmoe.models.family import (
    Family,
    HFConfig,
    balanced_router,
    common_fields,
    dense_and_shared,
    is_past_the_last_layer,
    prediction_witness,
)
from jmoe.models.names import deepseek_names

# defaults of transformers' Glm4MoeConfig for absent fields of config.json (sizes of weights are required)
DEFAULTS = {
    "num_key_value_heads": 8,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.5,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
}


def config(hf: HFConfig) -> ModelConfig:
    hf = hf.with_defaults(DEFAULTS)
    common = common_fields(hf, experts=("n_routed_experts",), inner_dim="moe_intermediate_size")
    return ModelConfig(
        architecture="Glm4MoeForCausalLM",
        **common,
        router=balanced_router(hf),
        qk_norm="head" if hf.get("use_qk_norm", False) else "none",
        qkv_bias=bool(hf.get("attention_bias", False)),
        **dense_and_shared(hf, common["moe_intermediate_size"]),
    )


FAMILY = Family(
    "Glm4MoeForCausalLM", config, deepseek_names, is_past_the_last_layer, witness=prediction_witness
)
