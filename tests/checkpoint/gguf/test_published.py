"""The metadata and tensors of published files, restated: they give the configuration of the model's own
``config.json``, and every tensor has its parameter."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jmoe.checkpoint.gguf.config import config_values
from jmoe.checkpoint.gguf.names import tensor_names
from jmoe.checkpoint.safetensors_file import TensorInfo
from jmoe.config.model import ModelConfig
from jmoe.models import model_config

QWEN3_30B = {
    "qwen3moe.block_count": 48, "qwen3moe.context_length": 40960, "qwen3moe.embedding_length": 2048,
    "qwen3moe.feed_forward_length": 6144, "qwen3moe.attention.head_count": 32,
    "qwen3moe.attention.head_count_kv": 4, "qwen3moe.rope.freq_base": 1000000.0,
    "qwen3moe.attention.layer_norm_rms_epsilon": 1e-06, "qwen3moe.expert_used_count": 8,
    "qwen3moe.attention.key_length": 128, "qwen3moe.attention.value_length": 128,
    "qwen3moe.expert_count": 128, "qwen3moe.expert_feed_forward_length": 768,
    "tokenizer.ggml.eos_token_id": 151645, "tokenizer.ggml.bos_token_id": 151643,
}  # fmt: skip
QWEN3_30B_CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "decoder_sparse_step": 1,
    "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
    "max_position_embeddings": 40960, "mlp_only_layers": [], "moe_intermediate_size": 768,
    "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
    "use_sliding_window": False, "vocab_size": 151936, "eos_token_id": 151645, "bos_token_id": 151643,
}  # fmt: skip
GPT_OSS_20B = {
    "gpt-oss.block_count": 24, "gpt-oss.context_length": 131072, "gpt-oss.embedding_length": 2880,
    "gpt-oss.feed_forward_length": 2880, "gpt-oss.attention.head_count": 64,
    "gpt-oss.attention.head_count_kv": 8, "gpt-oss.rope.freq_base": 150000.0,
    "gpt-oss.attention.layer_norm_rms_epsilon": 1e-05, "gpt-oss.expert_count": 32,
    "gpt-oss.expert_used_count": 4, "gpt-oss.attention.key_length": 64, "gpt-oss.attention.value_length": 64,
    "gpt-oss.attention.sliding_window": 128, "gpt-oss.expert_feed_forward_length": 2880,
    "gpt-oss.rope.scaling.type": "yarn", "gpt-oss.rope.scaling.factor": 32.0,
    "gpt-oss.rope.scaling.original_context_length": 4096, "tokenizer.ggml.eos_token_id": 200002,
    "tokenizer.ggml.bos_token_id": 199998,
}  # fmt: skip
GPT_OSS_20B_CONFIG = {
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "eos_token_id": 200002, "head_dim": 64,
    "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096, "intermediate_size": 2880,
    "max_position_embeddings": 131072, "num_attention_heads": 64, "num_experts_per_tok": 4,
    "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
        "rope_type": "yarn", "truncate": False,
    },
    "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False,
    "vocab_size": 201088, "bos_token_id": 199998,
}  # fmt: skip
MIXTRAL_8X7B = {
    "llama.block_count": 32, "llama.context_length": 32768, "llama.embedding_length": 4096,
    "llama.feed_forward_length": 14336, "llama.attention.head_count": 32, "llama.attention.head_count_kv": 8,
    "llama.rope.freq_base": 1000000.0, "llama.attention.layer_norm_rms_epsilon": 1e-05,
    "llama.expert_count": 8, "llama.expert_used_count": 2, "llama.rope.dimension_count": 128,
    "llama.vocab_size": 32000, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
}  # fmt: skip
MIXTRAL_8X7B_CONFIG = {
    "architectures": ["MixtralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
    "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
    "vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
EXPERTS = ("ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
LAYERS = {  # the tensors of a layer, as the published files have them
    "qwen3moe": [
        f"{name}.weight"
        for name in (*ATTENTION, *EXPERTS, "attn_norm", "attn_q_norm", "attn_k_norm", "ffn_norm")
    ],
    "gpt-oss": [
        *(f"{name}.{part}" for name in (*ATTENTION, *EXPERTS) for part in ("weight", "bias")),
        "attn_norm.weight", "post_attention_norm.weight", "attn_sinks.weight",
    ],
    "llama": [f"{name}.weight" for name in (*ATTENTION, *EXPERTS, "attn_norm", "ffn_norm")],
}  # fmt: skip
PUBLISHED = {  # and the number of tensors that llama.cpp reports
    "qwen3moe": (QWEN3_30B, QWEN3_30B_CONFIG, 579),
    "gpt-oss": (GPT_OSS_20B, GPT_OSS_20B_CONFIG, 459),
    "llama": (MIXTRAL_8X7B, MIXTRAL_8X7B_CONFIG, 323),
}


def config_of(architecture: str, metadata: dict[str, Any]) -> ModelConfig:
    vocabulary = PUBLISHED[architecture][1]["vocab_size"]
    width = metadata[f"{architecture}.embedding_length"]
    tensors = {
        name: TensorInfo(Path("m.gguf"), "Q4_K", (vocabulary, width), 0, 0)
        for name in ("token_embd.weight", "output.weight")
    }
    return model_config(config_values({"general.architecture": architecture} | metadata, tensors))


@pytest.mark.parametrize("architecture", PUBLISHED)
def test_a_published_file_has_the_configuration_of_its_model(architecture: str):
    metadata, config, _ = PUBLISHED[architecture]
    found, want = config_of(architecture, metadata), model_config(config | {"dtype": "bfloat16"})
    assert replace(found, quant_method=None) == want


@pytest.mark.parametrize("architecture", PUBLISHED)
def test_a_published_file_has_a_tensor_for_every_parameter(architecture: str):
    metadata, _, count = PUBLISHED[architecture]
    cfg = config_of(architecture, metadata)
    layers = [f"blk.{i}.{name}" for i in range(cfg.num_hidden_layers) for name in LAYERS[architecture]]
    want = {"token_embd.weight", "output_norm.weight", "output.weight", *layers}
    assert {stored.name for stored in tensor_names(cfg)} == want and len(want) == count


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qwen3moe.expert_count": None}, "the metadata has no qwen3moe.expert_count"),
        ({"qwen3moe.block_count": "many"}, "qwen3moe.block_count must be a number, got 'many'"),
        ({"qwen3moe.rope.scaling.type": "longrope"}, "rope.scaling.type 'longrope' is not read"),
        ({"qwen3moe.embedding_length": 0}, "hidden_size must be a positive integer, got 0"),
    ],
)
def test_metadata_that_is_not_read_is_refused_by_key(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        config_of("qwen3moe", QWEN3_30B | {"qwen3moe.rope.scaling.factor": 2.0} | change)


def test_a_llama_without_experts_is_refused():
    with pytest.raises(ValueError, match="'llama' is read with experts only"):
        config_of("llama", MIXTRAL_8X7B | {"llama.expert_count": 0})
