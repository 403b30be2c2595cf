"""Mixtral (8x7B, 8x22B): softmax over the chosen experts, optional sliding window, no query/key norm."""

from functools import partial

from jmoe.config.model import ModelConfig
from jmoe.config.parts import RouterConfig
from jmoe.models.family import Family, HFConfig, common_fields
from jmoe.models.names import decoder_names, mixtral_experts

# defaults of transformers' MixtralConfig for absent fields of config.json (sizes of weights are required)
DEFAULTS = {
    "num_key_value_heads": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def config(hf: HFConfig) -> ModelConfig:
    hf = hf.with_defaults(DEFAULTS)
    return ModelConfig(
        architecture="MixtralForCausalLM",
        **common_fields(hf, experts=("num_local_experts", "num_experts"), inner_dim="intermediate_size"),
        router=RouterConfig(norm_topk_prob=True),
        sliding_window=hf.get("sliding_window"),
    )


FAMILY = Family("MixtralForCausalLM", config, partial(decoder_names, experts=mixtral_experts))
