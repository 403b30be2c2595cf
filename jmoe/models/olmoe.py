"""OLMoE (1B-7B): query/key norm over all heads together, top-k weights not renormalised by default."""

from functools import partial

from jmoe.config.model import ModelConfig
from jmoe.config.parts import RouterConfig
from jmoe.models.family import Family, HFConfig, common_fields
from jmoe.models.names import decoder_names, qwen_experts

# defaults of transformers' OlmoeConfig for absent fields of config.json (sizes of weights are required)
DEFAULTS = {
    "num_experts_per_tok": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "eos_token_id": 50279,
}


def config(hf: HFConfig) -> ModelConfig:
    hf = hf.with_defaults(DEFAULTS)
    return ModelConfig(
        architecture="OlmoeForCausalLM",
        **common_fields(hf, experts=("num_experts", "num_local_experts"), inner_dim="intermediate_size"),
        router=RouterConfig(norm_topk_prob=bool(hf.get("norm_topk_prob", False))),
        qk_norm="full",
        attention_bias=bool(hf.get("attention_bias", False)),
        clip_qkv=hf.get("clip_qkv"),
    )


FAMILY = Family("OlmoeForCausalLM", config, partial(decoder_names, experts=qwen_experts))
