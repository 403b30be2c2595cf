"""Mixtral (8x7B, 8x22B): softmax over the chosen experts, optional sliding window, no query/key norm."""

from collections.abc import Iterator

from jmoe.config import ModelConfig
from jmoe.models.family import Family, HFConfig, WeightName, common_fields, weight_names

# what transformers' MixtralConfig has where config.json is silent (sizes of weights are required)
DEFAULTS: HFConfig = {
    "num_key_value_heads": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def config(hf: HFConfig) -> ModelConfig:
    hf = {**DEFAULTS, **hf}
    return ModelConfig(
        architecture="MixtralForCausalLM",
        **common_fields(hf, experts=("num_local_experts", "num_experts"), inner="intermediate_size"),
        norm_topk_prob=True,
        sliding_window=hf.get("sliding_window"),
    )


def names(cfg: ModelConfig) -> Iterator[WeightName]:
    return weight_names(
        cfg,
        gate="block_sparse_moe.gate",
        experts="block_sparse_moe.experts",
        gate_up_down=("w1", "w3", "w2"),
    )


FAMILY = Family("MixtralForCausalLM", config, names)
