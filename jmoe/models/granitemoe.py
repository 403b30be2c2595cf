"""Granite-MoE (1B-A400M, 3B-A800M): Mixtral with multipliers (embedding, attention, residual, logits)."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from jmoe.config.model import ModelConfig
from jmoe.config.parts import RouterConfig
from jmoe.models.family import Family, HFConfig, common_fields, require
from jmoe.models.names import decoder_names, stacked_names
from jmoe.models.weights import Form, StoredTensor

# defaults of transformers' GraniteMoeConfig for absent fields of config.json (sizes of weights are required)
DEFAULTS = {
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "embedding_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}
MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")


def config(hf: HFConfig) -> ModelConfig:
    hf = hf.with_defaults(DEFAULTS)
    multipliers: dict[str, Any] = {name: require(hf, name) for name in MULTIPLIERS}
    return ModelConfig(
        architecture="GraniteMoeForCausalLM",
        **common_fields(hf, experts=("num_local_experts", "num_experts"), inner_dim="intermediate_size"),
        router=RouterConfig(norm_topk_prob=True),
        attention_bias=bool(hf.get("attention_bias", False)),
        **multipliers,
    )


def experts(cfg: ModelConfig, hf_prefix: str, prefix: str) -> Iterator[StoredTensor]:
    block, path = f"{hf_prefix}.block_sparse_moe", f"{prefix}.moe.experts"
    yield StoredTensor(f"{block}.router.layer.weight", f"{prefix}.moe.router.gate_ED")
    halves = Form(row_layout="halves")
    yield from stacked_names(cfg, f"{block}.input_linear.weight", f"{path}.gate_up_E2FD", halves)
    yield from stacked_names(cfg, f"{block}.output_linear.weight", f"{path}.down_EDF")


FAMILY = Family("GraniteMoeForCausalLM", config, partial(decoder_names, experts=experts))
