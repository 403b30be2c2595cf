"""Phi-3.5-MoE (42B-A6.6B; arXiv 2404.14219): sparse-mixer routing, LayerNorm, biases, LongRoPE."""

from functools import partial

from jmoe.config.model import ModelConfig
from jmoe.config.parts import RouterConfig
from jmoe.models.family import Family, HFConfig, common_fields, require
from jmoe.models.names import decoder_names, mixtral_experts

# defaults of transformers' PhimoeConfig for absent fields of config.json (sizes of weights are required)
DEFAULTS = {
    "num_key_value_heads": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "router_jitter_noise": 0.01,
}


def config(hf: HFConfig) -> ModelConfig:
    hf = hf.with_defaults(DEFAULTS)
    jitter = require(hf, "router_jitter_noise")
    return ModelConfig(
        architecture="PhimoeForCausalLM",
        **common_fields(hf, experts=("num_local_experts", "num_experts"), inner_dim="intermediate_size"),
        router=RouterConfig(scoring_func="sparsemixer", norm_topk_prob=False, router_jitter_noise=jitter),
        norm="layer",
        attention_bias=bool(hf.get("attention_bias", False)),
        lm_head_bias=bool(hf.get("lm_head_bias", False)),
        sliding_window=hf.get("sliding_window"),
    )


names = partial(decoder_names, experts=mixtral_experts)
FAMILY = Family("PhimoeForCausalLM", config, names)
PUBLISHED = Family("PhiMoEForCausalLM", config, names)  # the spelling in Microsoft's own checkpoints
