"""Writes tests/golden: a tiny random checkpoint of each family by transformers, its logits and greedy tokens.

    python scripts/make/golden.py [family ...]        (needs the parity extra)

The default tests compare with these, so that parity is checked where torch is not installed. Sizes are odd
where neither meshes nor transformers' kernels (rows of 16 bytes) need them even.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

OUT = Path(__file__).parents[2] / "tests" / "golden"
NEW, LENGTH = 64, 20
SHARED: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.15,
    "eos_token_id": 0,
}
QWEN3: dict[str, Any] = {
    "num_experts": 6,
    "moe_intermediate_size": 12,
    "head_dim": 10,
    "norm_topk_prob": True,
}
QWEN2: dict[str, Any] = {
    "vocab_size": 51, "num_experts": 8, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 14,
}  # fmt: skip
LATENT: dict[str, Any] = {  # the first of three layers is dense
    "vocab_size": 47, "num_hidden_layers": 3, "num_key_value_heads": 4,
    "kv_lora_rank": 10, "q_lora_rank": 9, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 7,
    "n_routed_experts": 8, "moe_intermediate_size": 8, "intermediate_size": 18, "first_k_dense_replace": 1,
    "n_group": 4, "topk_group": 2,
}  # fmt: skip
YARN: dict[str, Any] = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32,
    "beta_fast": 32, "beta_slow": 1, "mscale": 0.9, "mscale_all_dim": 0.6,
}  # fmt: skip
V2 = {"topk_method": "group_limited_greedy", "routed_scaling_factor": 1.7, "rope_parameters": YARN}
GLM4: dict[str, Any] = {
    "vocab_size": 47, "num_hidden_layers": 3, "head_dim": 12, "n_routed_experts": 8, "num_experts_per_tok": 3,
    "moe_intermediate_size": 8, "intermediate_size": 18, "n_group": 2, "topk_group": 1,
    "routed_scaling_factor": 1.5, "use_qk_norm": True, "attention_bias": True,
}  # fmt: skip
LONGROPE: dict[str, Any] = {  # the parity tests check contexts beyond the original ones
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.3, 1.7],
    "long_factor": [1.0, 2.0, 8.0], "short_mscale": 1.2, "long_mscale": 1.3, "factor": 4.0,
    "original_max_position_embeddings": 96,
}  # fmt: skip
PHI: dict[str, Any] = {
    "vocab_size": 51, "num_local_experts": 8, "intermediate_size": 12, "attention_bias": True,
    "lm_head_bias": True, "rope_parameters": LONGROPE,
}  # fmt: skip
GPT_OSS: dict[str, Any] = {  # MXFP4 keeps rows of 32 at least
    "vocab_size": 45, "hidden_size": 32, "head_dim": 6, "num_local_experts": 8, "intermediate_size": 8,
    "sliding_window": 5,
}  # fmt: skip
LLAMA4: dict[str, Any] = {  # experts in every other layer; the third does not rotate
    "vocab_size": 47, "num_hidden_layers": 4, "num_experts_per_tok": 1, "head_dim": 6, "num_local_experts": 8,
    "intermediate_size": 6, "intermediate_size_mlp": 14, "interleave_moe_layer_step": 2,
    "no_rope_layer_interval": 3, "attention_chunk_size": 7, "floor_scale": 4,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    },
}  # fmt: skip
GRANITE: dict[str, Any] = {
    "vocab_size": 51, "num_local_experts": 8, "intermediate_size": 12, "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2, "residual_multiplier": 0.7, "logits_scaling": 2.5,
}  # fmt: skip
MODELS = {
    "qwen3_moe": transformers.Qwen3MoeConfig(**SHARED, **QWEN3),
    "mixtral": transformers.MixtralConfig(
        **SHARED, num_local_experts=5, intermediate_size=12, sliding_window=9
    ),
    "olmoe": transformers.OlmoeConfig(
        **SHARED, num_experts=6, intermediate_size=12, tie_word_embeddings=True
    ),
    "qwen2_moe": transformers.Qwen2MoeConfig(**SHARED | QWEN2),
    "deepseek_v2": transformers.DeepseekV2Config(**SHARED | LATENT | V2),
    "deepseek_v3": transformers.DeepseekV3Config(**SHARED | LATENT),
    "glm4_moe": transformers.Glm4MoeConfig(**SHARED | GLM4),
    "phimoe": transformers.PhimoeConfig(**SHARED | PHI),
    "gpt_oss": transformers.GptOssConfig(**SHARED | GPT_OSS),
    "llama4": transformers.Llama4TextConfig(**SHARED | LLAMA4),
    "granitemoe": transformers.GraniteMoeConfig(**SHARED | GRANITE),
}

# each family's first seed with greedy tokens that are worth a comparison, if that is not 1
SEEDS = {
    "olmoe": 92, "qwen2_moe": 2, "deepseek_v2": 2, "deepseek_v3": 2, "glm4_moe": 4, "phimoe": 11,
    "granitemoe": 2,
}  # fmt: skip


def randomize(model: torch.nn.Module) -> None:
    """Makes random what is 0, 1 or nearly so in a fresh model, so that it has an effect."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.add_(0.2 * torch.randn_like(parameter))
        elif name.endswith("bias"):
            parameter.normal_(std=0.2)
        elif name.endswith(("gate.weight", "router.weight", "router.layer.weight")):
            parameter.mul_(8.0)  # so that there are no near ties
        elif name.endswith("sinks"):
            parameter.normal_()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.3)


def write(name: str, config: transformers.PretrainedConfig) -> None:
    torch.manual_seed(SEEDS.get(name, 1))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    prompt = np.random.default_rng(1).integers(1, config.vocab_size, LENGTH)
    tokens = torch.tensor(prompt)[None]
    with torch.no_grad():
        randomize(model)
        for _ in range(NEW):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
        logits = model(tokens).logits[0]
    _check_telling(name, tokens[0, LENGTH:], logits[LENGTH - 1 : -1])
    directory = OUT / name
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    golden = {"prompt": prompt, "tokens": tokens[0].numpy(), "logits": logits.numpy()}
    np.savez_compressed(directory / "golden.npz", **golden)
    print(name, json.dumps({"bytes": sum(f.stat().st_size for f in directory.iterdir())}))


def _check_telling(name: str, greedy_tokens: torch.Tensor, logits: torch.Tensor) -> None:
    """Raises ValueError if nearly all greedy tokens are the same, or if rounding could change one of them."""
    best = logits.topk(2).values
    different, margin = len(set(greedy_tokens.tolist())), float((best[:, 0] - best[:, 1]).min())
    if different < 8 or margin < 5e-4:
        raise ValueError(f"{name}: {different} different tokens, margin {margin:.2g}; give it another seed")


if __name__ == "__main__":
    for name in sys.argv[1:] or MODELS:
        write(name, MODELS[name])
