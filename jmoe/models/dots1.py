"""dots.llm1 (142B-A14B): DeepSeek-V3's router over Qwen3's attention."""

from jmoe.config.model import LayerType, ModelConfig
from jmoe.models.family import Family, HFConfig, balanced_router, common_fields, dense_and_shared, require
from jmoe.models.names import deepseek_names

# defaults of transformers' Dots1Config for absent fields of config.json (sizes of weights are required)
DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": False,
    "sliding_window": 4096,
    "max_window_layers": 62,
}


def config(hf: HFConfig) -> ModelConfig:
    hf = hf.with_defaults(DEFAULTS)
    common = common_fields(hf, experts=("n_routed_experts",), inner_dim="moe_intermediate_size")
    full = require(hf, "max_window_layers") if hf["sliding_window"] else common["num_hidden_layers"]
    kinds: tuple[LayerType, ...] = "full_attention", "sliding_attention"
    own: list[LayerType] = [kinds[i >= full] for i in range(common["num_hidden_layers"])]
    return ModelConfig(
        architecture="Dots1ForCausalLM",
        **common,
        router=balanced_router(hf),
        qk_norm="head",
        attention_bias=bool(hf.get("attention_bias", False)),
        layer_types=tuple(hf.get("layer_types") or own),
        sliding_window=hf["sliding_window"],
        **dense_and_shared(hf, common["moe_intermediate_size"]),
    )


FAMILY = Family("Dots1ForCausalLM", config, deepseek_names)
