"""Compares the fields that a config.json leaves out with those of transformers' configuration classes."""

from typing import Any

import pytest

from jmoe.config.model import ModelConfig
from jmoe.config.parts import LatentConfig, RopeConfig, RouterConfig
from jmoe.models import model_config

transformers = pytest.importorskip("transformers", reason="needs the parity extra")
pytestmark = pytest.mark.parity

SIZES = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 5, "num_attention_heads": 16}
LATENT = {"kv_lora_rank": 20, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 10}
INNER = {"moe_intermediate_size": 20}
ROUTED = {"n_routed_experts": 24, "intermediate_size": 28, **INNER}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "Mixtral": (transformers.MixtralConfig, {"intermediate_size": 20, "num_experts": 24}),
    "Qwen2Moe": (transformers.Qwen2MoeConfig, {**INNER, "num_experts": 24}),
    "Qwen3Moe": (transformers.Qwen3MoeConfig, {**INNER, "num_experts": 24}),
    "Olmoe": (transformers.OlmoeConfig, {"intermediate_size": 20, "num_experts": 24}),
    "DeepseekV2": (transformers.DeepseekV2Config, {**ROUTED, **LATENT, "num_experts_per_tok": 4}),
    "DeepseekV3": (transformers.DeepseekV3Config, {**ROUTED, **LATENT}),
    "Glm4Moe": (transformers.Glm4MoeConfig, ROUTED),
    "Phimoe": (transformers.PhimoeConfig, {"intermediate_size": 20, "num_local_experts": 24}),
    "GptOss": (transformers.GptOssConfig, {"intermediate_size": 20, "num_local_experts": 24}),
    "Llama4": (
        transformers.Llama4TextConfig,
        {"intermediate_size": 20, "intermediate_size_mlp": 28, "num_local_experts": 24},
    ),
    "GraniteMoe": (transformers.GraniteMoeConfig, {"intermediate_size": 20, "num_local_experts": 24}),
}
GIVEN: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 2, "rms_norm_eps": 1e-4, "tie_word_embeddings": True, "eos_token_id": [3, 4]},
    {"rope_theta": 777.0, "bos_token_id": 7, "eos_token_id": None},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}, "num_experts_per_tok": 2},
    {"use_sliding_window": True, "norm_topk_prob": True, "attention_bias": True, "dtype": "bfloat16"},
    {"use_sliding_window": True, "sliding_window": 9, "max_position_embeddings": 555, "head_dim": 8},
)
OWN: dict[str, tuple[dict[str, Any], ...]] = {
    "Mixtral": ({"sliding_window": None},),
    "Qwen2Moe": (
        {"mlp_only_layers": [2], "decoder_sparse_step": 2, "qkv_bias": False},
        {"use_sliding_window": True, "max_window_layers": 3, "shared_expert_intermediate_size": 12},
    ),
    "Qwen3Moe": ({"mlp_only_layers": [2], "decoder_sparse_step": 2, "sliding_window": None},),
    "Olmoe": ({"clip_qkv": 3.0},),
    "DeepseekV2": (
        {"q_lora_rank": None, "first_k_dense_replace": 2, "n_shared_experts": 3},
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.0},
    ),
    "DeepseekV3": (
        {"q_lora_rank": 8, "first_k_dense_replace": 0, "n_shared_experts": 2, "rope_interleave": False},
        {"n_group": 3, "topk_group": 1, "routed_scaling_factor": 2.0, "norm_topk_prob": False},
    ),
    "Glm4Moe": (
        {"use_qk_norm": True, "n_group": 2, "norm_topk_prob": False, "n_shared_experts": 2},
        {"first_k_dense_replace": 0, "routed_scaling_factor": 3.0, "head_dim": 16},
    ),
    "Phimoe": ({"lm_head_bias": True, "router_jitter_noise": 0.1},),
    "GptOss": ({"layer_types": ["full_attention"] * 5, "attention_bias": False},),
    "Llama4": (
        {"interleave_moe_layer_step": 2, "no_rope_layer_interval": 2, "attention_chunk_size": 9},
        {"moe_layers": [1, 3], "no_rope_layers": [1, 0, 1, 0, 1], "use_qk_norm": False, "floor_scale": 5},
        {"attn_temperature_tuning": False, "attn_scale": 0.3, "no_rope_layers": []},
    ),
    "GraniteMoe": (
        {"embedding_multiplier": 12, "residual_multiplier": 0.22},
        {"attention_multiplier": 0.02, "logits_scaling": 6.0},
    ),
}
UNREAD = {"DeepseekV2": {"norm_topk_prob"}}  # refused, since transformers does not read it
CASES = [
    pytest.param(
        name, {k: v for k, v in given.items() if k not in UNREAD.get(name, ())}, id=f"{name}-{given}"
    )
    for name in FAMILIES
    for given in (*GIVEN, *OWN[name])
]


def router(name: str, config: Any) -> RouterConfig:
    """Returns the router of the family's model for a configuration."""
    match name:
        case "Mixtral" | "GraniteMoe":
            return RouterConfig(norm_topk_prob=True)
        case "DeepseekV2":
            limited = config.topk_method == "group_limited_greedy"
            groups = {"n_group": config.n_group, "topk_group": config.topk_group} if limited else {}
            scale = config.routed_scaling_factor
            return RouterConfig(norm_topk_prob=False, routed_scaling_factor=scale, **groups)
        case "DeepseekV3" | "Glm4Moe":
            same = "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor"
            values = {field: getattr(config, field) for field in same}
            return RouterConfig("sigmoid", group_score="top2", correction_bias=True, **values)
        case "Phimoe":
            jitter = config.router_jitter_noise
            return RouterConfig("sparsemixer", norm_topk_prob=False, router_jitter_noise=jitter)
        case "GptOss":
            return RouterConfig(bias=True)
        case "Llama4":
            return RouterConfig("sigmoid", norm_topk_prob=False, weigh_input=True)
    return RouterConfig(norm_topk_prob=config.norm_topk_prob)


def rope(name: str, config: Any) -> RopeConfig:
    neighbours = {"DeepseekV2": True, "DeepseekV3": getattr(config, "rope_interleave", True), "Llama4": True}
    return RopeConfig(interleaved=neighbours.get(name, False), **config.rope_parameters)


def dense_layers(name: str, config: Any) -> tuple[int, ...]:
    layers = range(config.num_hidden_layers)
    if name.startswith("Qwen"):
        step = config.decoder_sparse_step
        return tuple(i for i in layers if i in config.mlp_only_layers or (i + 1) % step)
    if name == "Llama4":
        return tuple(i for i in layers if i not in config.moe_layers)
    return tuple(layers[: getattr(config, "first_k_dense_replace", 0)])


def own(name: str, config: Any) -> dict[str, Any]:
    """Returns the fields of ModelConfig that only this family's model has, or that it has in its own way."""
    match name:
        case "Mixtral":
            return {"sliding_window": config.sliding_window, "attention_bias": False}
        case "Qwen2Moe":
            windowed = {"sliding_window": config.sliding_window, "layer_types": tuple(config.layer_types)}
            return {
                "qkv_bias": config.qkv_bias,
                "attention_bias": False,
                "shared_expert_gate": True,
                "shared_expert_intermediate_size": config.shared_expert_intermediate_size,
                **(windowed if config.use_sliding_window else {}),
            }
        case "Qwen3Moe":
            return {"qk_norm": "head", "sliding_window": config.sliding_window}
        case "Olmoe":
            return {"qk_norm": "full", "clip_qkv": config.clip_qkv}
        case "DeepseekV2" | "DeepseekV3":
            latent = LatentConfig(*LATENT.values(), q_lora_rank=config.q_lora_rank)
            return {
                "latent": latent,
                "num_key_value_heads": config.num_attention_heads,
                "head_dim": config.qk_rope_head_dim,
                "attention_multiplier": (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5,
            }
        case "Glm4Moe":
            norm = "head" if config.use_qk_norm else "none"
            return {"qk_norm": norm, "qkv_bias": config.attention_bias, "attention_bias": False}
        case "Phimoe":
            biases = {"lm_head_bias": config.lm_head_bias, "attention_bias": config.attention_bias}
            return {"norm": "layer", "sliding_window": config.sliding_window, **biases}
        case "GptOss":
            return {
                "hidden_act": "swiglu_oai",
                "expert_bias": True,
                "attention_sinks": True,
                "layer_types": tuple(config.layer_types),
                "sliding_window": config.sliding_window,
            }
        case "Llama4":
            return {
                "shared_expert_intermediate_size": config.intermediate_size,
                "no_rope_layers": tuple(config.no_rope_layers),
                "layer_types": tuple(config.layer_types),
                "attention_chunk_size": config.attention_chunk_size,
                "qk_norm": "l2" if config.use_qk_norm else "none",
                "attn_scale": config.attn_scale if config.attn_temperature_tuning else 0.0,
                "floor_scale": config.floor_scale,
            }
    multipliers = "embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"
    return {field: getattr(config, field) for field in multipliers}


def theirs(name: str, config: Any, dtype: Any) -> ModelConfig:
    """Returns what a transformers configuration states, as its model uses it.

    What it does not state is off.
    """
    same = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads "
        "num_experts_per_tok max_position_embeddings rms_norm_eps tie_word_embeddings bos_token_id"
    )
    ends, dense = config.eos_token_id, dense_layers(name, config)
    wide = "intermediate_size_mlp" if name == "Llama4" else "intermediate_size"
    inner = getattr(config, "moe_intermediate_size", config.intermediate_size)
    fields = {
        **{field: getattr(config, field) for field in same.split()},
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "num_experts": 24,
        "moe_intermediate_size": inner,
        "mlp_only_layers": dense,
        "intermediate_size": getattr(config, wide) if dense else None,
        "shared_expert_intermediate_size": inner * getattr(config, "n_shared_experts", 0),
        "attention_bias": getattr(config, "attention_bias", False),
        "eos_token_ids": () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,),
        "router": router(name, config),
        "rope": rope(name, config),
    }
    return ModelConfig(architecture=f"{name}ForCausalLM", dtype=dtype, **fields | own(name, config))


@pytest.mark.parametrize(("name", "given"), CASES)
def test_absent_fields_are_those_of_transformers(name: str, given: dict[str, Any]):
    make, sizes = FAMILIES[name]
    hf = {**SIZES, **sizes, **given}
    config = make.from_dict(dict(hf))
    assert config.hidden_act == "silu"
    got = model_config({"architectures": [f"{name}ForCausalLM"], **hf})
    assert got == theirs(name, config, got.dtype)
