"""DeepSeek-V2 (V2, V2-Lite; arXiv 2405.04434) and V3 (V3, R1; arXiv 2412.19437): latent attention, shared
experts, dense first layers, experts chosen within a token's best groups. V3 scores by a sigmoid and balances
the load by a bias."""

from jmoe.config.model import ModelConfig
from jmoe.config.parts import LatentConfig, RopeConfig, RouterConfig
from jmoe.models.family import (
    Family,
    HFConfig,
    balanced_router,
    common_fields,
    dense_and_shared,
    is_past_the_last_layer,
    prediction_witness,
    refuse,
    require,
)
from jmoe.models.names import deepseek_names
from jmoe.nn.rope import yarn_mscale

# defaults of transformers' DeepseekV2Config and DeepseekV3Config for absent fields of config.json
DEFAULTS_V2 = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "first_k_dense_replace": 0,
    "n_shared_experts": 2,
    "q_lora_rank": 1536,
}
DEFAULTS_V3 = {
    **DEFAULTS_V2,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "n_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}


def config_v2(hf: HFConfig) -> ModelConfig:
    hf = hf.with_defaults(DEFAULTS_V2)
    method = hf.get("topk_method") or "greedy"
    refuse(hf, "topk_method", method not in ("greedy", "group_limited_greedy"))
    refuse(hf, "scoring_func", hf.get("scoring_func", "softmax") != "softmax")
    # transformers ignores this field, DeepSeek's own code does not, and no checkpoint sets it
    refuse(hf, "norm_topk_prob", hf.get("norm_topk_prob"))
    groups = {name: require(hf, name) for name in ("n_group", "topk_group")} if method != "greedy" else {}
    scale = hf.get("routed_scaling_factor") or 1.0
    router = RouterConfig(norm_topk_prob=False, routed_scaling_factor=scale, **groups)
    return _config("DeepseekV2ForCausalLM", hf, router, interleaved=True)


def config_v3(hf: HFConfig) -> ModelConfig:
    hf = hf.with_defaults(DEFAULTS_V3)
    refuse(hf, "topk_method", hf.get("topk_method", "noaux_tc") != "noaux_tc")
    refuse(hf, "scoring_func", hf.get("scoring_func", "sigmoid") != "sigmoid")
    interleaved = bool(hf.get("rope_interleave", True))
    return _config("DeepseekV3ForCausalLM", hf, balanced_router(hf), interleaved=interleaved)


def _config(name: str, hf: HFConfig, router: RouterConfig, *, interleaved: bool) -> ModelConfig:
    refuse(hf, "moe_layer_freq", hf.get("moe_layer_freq", 1) != 1)
    sizes = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    latent = LatentConfig(*(require(hf, name) for name in sizes), q_lora_rank=hf["q_lora_rank"])
    own = {
        "num_key_value_heads": require(hf, "num_attention_heads"),
        "head_dim": latent.qk_rope_head_dim,
        "partial_rotary_factor": 1.0,
    }
    common = common_fields(
        hf.with_values(own),
        experts=("n_routed_experts",),
        inner_dim="moe_intermediate_size",
        interleaved=interleaved,
    )
    return ModelConfig(
        architecture=name,
        **common,
        latent=latent,
        router=router,
        attention_bias=bool(hf.get("attention_bias", False)),
        attention_multiplier=_score_scale(latent, common["rope"]),
        **dense_and_shared(hf, common["moe_intermediate_size"]),
    )


def _score_scale(latent: LatentConfig, rope: RopeConfig) -> float:
    """Returns the multiplier of attention scores; it is larger if YaRN extends the context."""
    by = yarn_mscale(rope.factor, rope.mscale_all_dim) if rope.factor and rope.mscale_all_dim else 1.0
    return latent.qk_head_dim**-0.5 * by * by


V2 = Family("DeepseekV2ForCausalLM", config_v2, deepseek_names)
V3 = Family(
    "DeepseekV3ForCausalLM", config_v3, deepseek_names, is_past_the_last_layer, witness=prediction_witness
)
