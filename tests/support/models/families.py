"""Tiny configurations of the families beyond the first three, in transformers' own fields.

They have odd sizes, and every option that a family has.
"""

import transformers
from support.models.parity import Case

QWEN2 = {
    "vocab_size": 101, "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2,
    "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "intermediate_size": 28,
    "shared_expert_intermediate_size": 20,
}  # fmt: skip
LATENT = {
    "vocab_size": 95, "hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 3,
    "kv_lora_rank": 16, "q_lora_rank": 14, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 8,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "intermediate_size": 28,
    "first_k_dense_replace": 1, "num_hidden_layers": 3,
}  # fmt: skip
V3 = LATENT | {"n_group": 4, "topk_group": 2}
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32,
    "beta_fast": 32, "beta_slow": 1, "mscale": 0.9, "mscale_all_dim": 0.6,
}  # fmt: skip
GLM4 = {
    "vocab_size": 93, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "intermediate_size": 28,
    "num_hidden_layers": 3, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.5,
}  # fmt: skip
DOTS1 = GLM4 | {
    "n_shared_experts": 1, "num_key_value_heads": 4, "hidden_size": 48, "norm_topk_prob": True,
    "first_k_dense_replace": 1, "sliding_window": 6, "max_window_layers": 2,
}  # fmt: skip
PHI = {
    "vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_local_experts": 6, "intermediate_size": 20, "num_experts_per_tok": 2,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.0, 2.0, 4.0, 8.0], "short_mscale": 1.2, "long_mscale": 1.3, "factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
GPT_OSS = {
    "vocab_size": 99, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 12, "sliding_window": 5,
    "num_hidden_layers": 3,
}  # fmt: skip
LLAMA4 = {
    "vocab_size": 91, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size": 12, "intermediate_size_mlp": 20,
    "num_hidden_layers": 4, "no_rope_layer_interval": 2, "attention_chunk_size": 7, "floor_scale": 4,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
GRANITE = {
    "vocab_size": 94, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 12, "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2, "residual_multiplier": 0.7, "logits_scaling": 2.5,
}  # fmt: skip

FIRST = {  # the configuration of each family on which every technique is tried
    "qwen2": Case("qwen2", transformers.Qwen2MoeConfig, QWEN2),
    "deepseek-v2": Case(
        "deepseek-v2", transformers.DeepseekV2Config,
        LATENT | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
                  "routed_scaling_factor": 1.7},
    ),
    "deepseek-v3": Case("deepseek-v3", transformers.DeepseekV3Config, V3),
    "glm4": Case("glm4", transformers.Glm4MoeConfig, GLM4),
    "dots1": Case("dots1", transformers.Dots1Config, DOTS1),
    "phi": Case("phi", transformers.PhimoeConfig, PHI | {"attention_bias": True, "lm_head_bias": True}),
    "gpt-oss": Case("gpt-oss", transformers.GptOssConfig, GPT_OSS),
    "llama4": Case("llama4", transformers.Llama4TextConfig, LLAMA4),
    "granite": Case("granite", transformers.GraniteMoeConfig, GRANITE),
}  # fmt: skip
OPTIONS = (
    Case("qwen2-dense-layers", transformers.Qwen2MoeConfig,
         QWEN2 | {"mlp_only_layers": [1], "num_hidden_layers": 3, "norm_topk_prob": True}, 1),
    Case("qwen2-window", transformers.Qwen2MoeConfig,
         QWEN2 | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2, "qkv_bias": False,
                  "num_hidden_layers": 3, "decoder_sparse_step": 2, "tie_word_embeddings": True}, 2),
    Case("deepseek-v2-lite", transformers.DeepseekV2Config,
         LATENT | {"q_lora_rank": None, "rope_parameters": YARN, "n_shared_experts": 1}, 1),
    Case("deepseek-v3-yarn-bias", transformers.DeepseekV3Config,
         V3 | {"rope_parameters": YARN, "attention_bias": True, "rope_interleave": False}, 1),
    Case("deepseek-v3-one-group", transformers.DeepseekV3Config,
         V3 | {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "q_lora_rank": None,
               "first_k_dense_replace": 0}, 2),
    Case("glm4-norms-bias", transformers.Glm4MoeConfig,
         GLM4 | {"use_qk_norm": True, "attention_bias": True, "n_group": 1}, 1),
    Case("phi-longrope", transformers.PhimoeConfig, PHI | {"rope_parameters": LONGROPE}, 1),
    Case("phi-window", transformers.PhimoeConfig, PHI | {"sliding_window": 6, "router_jitter_noise": 0.2}, 2),
    Case("gpt-oss-full-first", transformers.GptOssConfig,
         GPT_OSS | {"layer_types": ["full_attention", "sliding_attention", "full_attention"],
                    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, 1),
    Case("llama4-interleaved", transformers.Llama4TextConfig,
         LLAMA4 | {"interleave_moe_layer_step": 2, "rope_parameters": LLAMA3_ROPE}, 1),
    Case("llama4-plain", transformers.Llama4TextConfig,
         LLAMA4 | {"use_qk_norm": False, "attn_temperature_tuning": False, "attention_bias": True}, 2),
    Case("granite-tied-bias", transformers.GraniteMoeConfig,
         GRANITE | {"tie_word_embeddings": True, "attention_bias": True}, 1),
)  # fmt: skip
