"""The metadata of a GGUF file as the values that ``config.json`` of the same model has.

What llama.cpp decides by the architecture's name, and so does not write, is stated here for each of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jmoe.checkpoint.gguf.blocks import FORMATS
from jmoe.checkpoint.safetensors_file import TensorInfo
from jmoe.config.reading import shown

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
SOFTMAX, SIGMOID = 1, 2  # values of expert_gating_func
ENDS = ("eos", "eot", "eom")
YARN = {"rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0}
LOG_MULTIPLIER = 0.1  # of a YaRN's mscale_all_dim in the metadata (arXiv 2309.00071, section 3.4)

Values = dict[str, Any]


@dataclass(frozen=True)
class Metadata:
    """A model's metadata and tensors.

    values: metadata by key.
    tensors: tensors by name.
    """

    values: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        """Returns a value of the architecture; its name is the prefix of the key."""
        return self.values.get(f"{self.architecture}.{key}", default)

    def require(self, key: str) -> Any:
        if (value := self.get(key)) is None:
            raise ValueError(f"the metadata has no {self.architecture}.{key}")
        return value

    def number(self, key: str, default: float | None = None) -> Any:
        """Returns a value that is computed with."""
        value = self.require(key) if default is None else self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{self.architecture}.{key} must be a number, got {shown(value)}")
        return value

    def rows(self, name: str) -> int:
        """Returns the rows of a matrix, or of each matrix of a stack."""
        shape = self.tensors[name].shape if name in self.tensors else ()
        if len(shape) < 2:
            raise ValueError(f"there is no matrix {name!r}")
        return shape[-2]

    def refuse(self, key: str, *read: Any) -> None:
        """Raises ValueError if a value is none of those that are read."""
        if (value := self.get(key, read[0])) not in read:
            texts = " or ".join(map(str, read))
            raise ValueError(f"{self.architecture}.{key} is {shown(value)}; {texts} is read")


def config_values(metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Values:
    """Returns what ``config.json`` would say; raises ValueError naming the key that is absent or the
    architecture that is not read."""
    model = Metadata(metadata, tensors)
    if model.architecture not in ARCHITECTURES:
        read = ", ".join(ARCHITECTURES)
        raise ValueError(f"the architecture {shown(model.architecture)} is not read from GGUF; {read} are")
    return _common(model) | ARCHITECTURES[model.architecture](model)


def _common(model: Metadata) -> Values:
    heads = model.number("attention.head_count")
    ends = [model.values.get(f"tokenizer.ggml.{name}_token_id") for name in ENDS]
    return {
        "vocab_size": model.rows(EMBEDDING),
        "hidden_size": model.require("embedding_length"),
        "num_hidden_layers": model.number("block_count") - model.number("nextn_predict_layers", 0),
        "num_attention_heads": heads,
        "num_key_value_heads": model.number("attention.head_count_kv", heads),
        "head_dim": model.get("attention.key_length"),
        "num_experts_per_tok": model.require("expert_used_count"),
        "max_position_embeddings": model.require("context_length"),
        "rms_norm_eps": model.require("attention.layer_norm_rms_epsilon"),
        "rope_theta": model.get("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(model),
        "tie_word_embeddings": HEAD not in model.tensors,
        "bos_token_id": model.values.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": sorted({end for end in ends if end is not None}) or None,
        "dtype": _dtype(model.tensors),
    }


def _dtype(tensors: Mapping[str, TensorInfo]) -> str:
    """Returns the dtype to compute in: bfloat16, or float32 for a model that has matrices of a wider type
    and no blocks."""
    kinds = {info.dtype for info in tensors.values() if len(info.shape) > 1}
    is_wide = kinds.isdisjoint(FORMATS) and "BF16" not in kinds
    return "float32" if is_wide else "bfloat16"


def _rope_scaling(model: Metadata) -> Values | None:
    kind = model.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    factor = model.number("rope.scaling.factor")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise ValueError(
            f"{model.architecture}.rope.scaling.type {shown(kind)} is not read; linear, yarn are"
        )
    length = model.number("rope.scaling.original_context_length")
    betas = {
        name: model.number(f"rope.scaling.yarn_{name}", YARN[name]) for name in ("beta_fast", "beta_slow")
    }
    return YARN | betas | {"factor": factor, "original_max_position_embeddings": length}


def _inner(model: Metadata, key: str, tensor: str) -> int:
    """Returns an MLP's inner size by its key, which older files lack, or by its first tensor."""
    value = model.get(key)
    if value is not None:
        return value
    return model.rows(next((name for name in model.tensors if name.endswith(tensor)), tensor))


def _experts(model: Metadata) -> Values:
    return {
        "num_experts": model.require("expert_count"),
        "moe_intermediate_size": _inner(model, "expert_feed_forward_length", ".ffn_gate_exps.weight"),
    }


def _qwen3(model: Metadata) -> Values:
    return {"architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": True, **_experts(model)}


def _qwen2(model: Metadata) -> Values:
    shared = _inner(model, "expert_shared_feed_forward_length", ".ffn_gate_shexp.weight")
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "norm_topk_prob": False,
        "qkv_bias": True,
        "shared_expert_intermediate_size": shared,
        **_experts(model),
    }


def _olmoe(model: Metadata) -> Values:
    return {
        "architectures": ["OlmoeForCausalLM"],
        "norm_topk_prob": False,
        "num_experts": model.require("expert_count"),
        "intermediate_size": model.require("feed_forward_length"),
        "clip_qkv": model.get("attention.clamp_kqv"),
    }


def _mixtral(model: Metadata) -> Values:
    if not model.get("expert_count"):
        raise ValueError(
            "the architecture 'llama' is read with experts only, and llama.expert_count is absent or 0"
        )
    return {
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": model.require("expert_count"),
        "intermediate_size": model.require("feed_forward_length"),
        "sliding_window": model.get("attention.sliding_window"),
    }


def _granite(model: Metadata) -> Values:
    return {
        "architectures": ["GraniteMoeForCausalLM"],
        "num_local_experts": model.require("expert_count"),
        "intermediate_size": _inner(model, "expert_feed_forward_length", ".ffn_gate_exps.weight"),
        "attention_multiplier": model.require("attention.scale"),
        "embedding_multiplier": model.require("embedding_scale"),
        "residual_multiplier": model.require("residual_scale"),
        "logits_scaling": model.require("logit_scale"),
    }


def _gpt_oss(model: Metadata) -> Values:
    scaling = _rope_scaling(model)
    return {
        "architectures": ["GptOssForCausalLM"],
        "num_local_experts": model.require("expert_count"),
        "intermediate_size": _inner(model, "expert_feed_forward_length", ".ffn_gate_exps.weight"),
        "sliding_window": model.require("attention.sliding_window"),
        "rope_scaling": None if scaling is None else scaling | {"truncate": False},
    }


def _balanced(model: Metadata) -> Values:
    """Returns the values of a router with sigmoid scores that are balanced by a bias, and of the shared
    experts and dense first layers."""
    return {
        "n_routed_experts": model.require("expert_count"),
        "moe_intermediate_size": model.require("expert_feed_forward_length"),
        "intermediate_size": model.get("feed_forward_length"),
        "first_k_dense_replace": model.get("leading_dense_block_count", 0),
        "n_shared_experts": model.get("expert_shared_count", 0),
        "routed_scaling_factor": model.get("expert_weights_scale", 1.0),
        "norm_topk_prob": model.get("expert_weights_norm", False),
        "n_group": model.get("expert_group_count", 1),
        "topk_group": model.get("expert_group_used_count", 1),
    }


def _glm4(model: Metadata) -> Values:
    model.refuse("expert_gating_func", SIGMOID)
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        "partial_rotary_factor": model.number("rope.dimension_count") / model.number("attention.key_length"),
        "attention_bias": "blk.0.attn_q.bias" in model.tensors,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in model.tensors,
        **_balanced(model),
    }


def _dots1(model: Metadata) -> Values:
    model.refuse("expert_gating_func", SIGMOID)
    return {"architectures": ["Dots1ForCausalLM"], "sliding_window": None, **_balanced(model)}


def _deepseek(model: Metadata) -> Values:
    """Returns the values of DeepSeek-V2, whose scores are a softmax, or of V3."""
    model.refuse("expert_gating_func", SOFTMAX, SIGMOID)
    is_v3 = model.get("expert_gating_func") == SIGMOID
    rotated = model.number("rope.dimension_count")
    of_head = "_mla" if model.get("attention.key_length_mla") else ""  # else the lengths are a head's anyway
    scaling = _rope_scaling(model)
    if scaling is not None:
        scale = round(model.number("rope.scaling.yarn_log_multiplier", 0.0) / LOG_MULTIPLIER, 6)
        scaling |= {"mscale": scale, "mscale_all_dim": scale}
    values = _balanced(model) | {
        "architectures": ["DeepseekV3ForCausalLM" if is_v3 else "DeepseekV2ForCausalLM"],
        "q_lora_rank": model.get("attention.q_lora_rank"),
        "kv_lora_rank": model.require("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": model.number(f"attention.key_length{of_head}") - rotated,
        "v_head_dim": model.require(f"attention.value_length{of_head}"),
        "rope_scaling": scaling,
        "head_dim": None,
    }
    is_grouped = not is_v3 and values["n_group"] > 1
    return values | ({"topk_method": "group_limited_greedy"} if is_grouped else {})


ARCHITECTURES: dict[str, Callable[[Metadata], Values]] = {
    "qwen3moe": _qwen3,
    "qwen2moe": _qwen2,
    "olmoe": _olmoe,
    "llama": _mixtral,
    "granitemoe": _granite,
    "gpt-oss": _gpt_oss,
    "glm4moe": _glm4,
    "dots1": _dots1,
    "deepseek2": _deepseek,
}
