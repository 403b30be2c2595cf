"""Writes Hugging Face checkpoints as GGUF files, as llama.cpp's converter does, with the ``gguf`` package.

The names of tensors are the package's own, so they do not depend on jmoe's table.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from jmoe.models import model_config

gguf = pytest.importorskip("gguf", reason="the gguf package writes the files of these tests")

ARCHITECTURES = {
    "Qwen3MoeForCausalLM": "qwen3moe", "Qwen2MoeForCausalLM": "qwen2moe", "OlmoeForCausalLM": "olmoe",
    "MixtralForCausalLM": "llama", "GraniteMoeForCausalLM": "granitemoe", "GptOssForCausalLM": "gpt-oss",
    "Glm4MoeForCausalLM": "glm4moe", "Dots1ForCausalLM": "dots1", "DeepseekV2ForCausalLM": "deepseek2",
    "DeepseekV3ForCausalLM": "deepseek2",
}  # fmt: skip
Types = Callable[[str, np.ndarray], str]  # (name in the file, numbers) -> name of a type
EXPERT = re.compile(r"(.*\.experts)\.([0-9]+)\.(.*)")
Merged = dict[str, np.ndarray]


def plain(name: str, numbers: np.ndarray) -> str:
    return "F32"


def write_gguf(
    directory: Path,
    path: Path,
    types: Types = plain,
    more: dict[str, Any] | None = None,
    *,
    split: int = 0,
    by_head: bool = False,
) -> dict[str, np.ndarray]:
    """Writes the checkpoint of ``directory``; returns the raw bytes of every tensor of blocks.

    more: further metadata, such as a tokenizer.
    split: tensors of a file; 0 is one file.
    by_head: whether keys and values of latent attention are apart, as newer files have them.
    """
    config = json.loads((directory / "config.json").read_text())
    arch = ARCHITECTURES[config["architectures"][0]]
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split)
    of_heads = mla(config) if by_head else {}
    for key, value in (metadata(config) | of_heads | (more or {})).items():
        add(writer, key if key.startswith(("tokenizer.", "general.")) else f"{arch}.{key}", value)
    written = {}
    source = load_file(directory / "model.safetensors")
    for name, numbers in tensors(config, split_heads(config, source) if by_head else source):
        kind = types(name, numbers)
        if kind == "F32":
            writer.add_tensor(name, numbers)
            continue
        raw = written[name] = encoded(numbers, kind)
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)


def encoded(numbers: np.ndarray, kind: str) -> np.ndarray:
    """Returns numbers in a type: the package's own rounding if it has one, or random blocks that are scaled
    to numbers of about a tenth."""
    try:
        return gguf.quantize(numbers, gguf.GGMLQuantizationType[kind])
    except NotImplementedError:
        rows = int(np.prod(numbers.shape[:-1]))
        raw = random_blocks(kind, rows * numbers.shape[-1], np.random.default_rng(rows), scale=0.002)
        return raw.reshape(*numbers.shape[:-1], -1)


# where the halves (float16) of a block are
HALVES = {
    "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q4_K": (0, 2),
    "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,), "MXFP4": (),
}  # fmt: skip


def random_blocks(kind: str, count: int, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """Returns random bytes that are blocks of ``count`` numbers; halves are within a factor of eight of
    ``scale``."""
    size, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = rng.integers(0, 256, (count // size, nbytes), dtype=np.uint8)
    for at in HALVES[kind]:
        halves = (scale * 2 ** rng.uniform(-1.5, 1.5, len(raw))).astype(np.float16)
        raw[:, at : at + 2] = halves[:, None].view(np.uint8)
    if kind == "MXFP4":
        raw[:, 0] = rng.integers(110, 128, len(raw))
    return raw


def metadata(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the values that llama.cpp's converter writes, without the architecture in front of a key."""
    cfg = model_config(config | {"dtype": "float32"})
    rope = {"rope.freq_base": cfg.rope.rope_theta}
    if cfg.rope.rope_type == "yarn":
        rope |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": cfg.rope.factor,
            "rope.scaling.original_context_length": cfg.rope.original_max_position_embeddings,
        }
    found = {
        "block_count": cfg.num_hidden_layers,
        "context_length": cfg.max_position_embeddings,
        "embedding_length": cfg.hidden_size,
        "feed_forward_length": config.get("intermediate_size"),
        "attention.head_count": cfg.num_attention_heads,
        "attention.head_count_kv": cfg.num_key_value_heads,
        "attention.key_length": cfg.head_dim,
        "attention.value_length": cfg.head_dim,
        "attention.layer_norm_rms_epsilon": cfg.rms_norm_eps,
        "attention.sliding_window": cfg.sliding_window,
        "expert_count": cfg.num_experts,
        "expert_used_count": cfg.num_experts_per_tok,
        "expert_feed_forward_length": cfg.moe_intermediate_size,
        "tokenizer.ggml.eos_token_id": next(iter(cfg.eos_token_ids), None),
        "tokenizer.ggml.bos_token_id": cfg.bos_token_id,
    }
    own = config["architectures"][0]
    if own in ("OlmoeForCausalLM", "MixtralForCausalLM"):
        del found["expert_feed_forward_length"]
    if own == "GraniteMoeForCausalLM":
        found |= {
            "attention.scale": cfg.attention_multiplier, "residual_scale": cfg.residual_multiplier,
            "embedding_scale": cfg.embedding_multiplier, "logit_scale": cfg.logits_scaling,
        }  # fmt: skip
    if own in ("Glm4MoeForCausalLM", "Dots1ForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"):
        found |= balanced(config, cfg)
    return rope | found


def balanced(config: dict[str, Any], cfg: Any) -> dict[str, Any]:
    found = {
        "leading_dense_block_count": len(cfg.mlp_only_layers),
        "expert_shared_count": cfg.shared_expert_intermediate_size // cfg.moe_intermediate_size,
        "expert_weights_scale": cfg.router.routed_scaling_factor,
        "expert_weights_norm": cfg.router.norm_topk_prob,
        "expert_gating_func": {"softmax": 1, "sigmoid": 2}[cfg.router.scoring_func],
        "expert_group_count": cfg.router.n_group,
        "expert_group_used_count": cfg.router.topk_group,
    }
    latent = cfg.latent
    if latent is None:
        return found | {"rope.dimension_count": int(cfg.head_dim * cfg.rope.partial_rotary_factor)}
    found |= {
        "rope.dimension_count": latent.qk_rope_head_dim,
        "attention.kv_lora_rank": latent.kv_lora_rank,
        "attention.q_lora_rank": latent.q_lora_rank,
        "attention.key_length": latent.qk_rope_head_dim + latent.qk_nope_head_dim,
        "attention.value_length": latent.v_head_dim,
    }
    if cfg.rope.mscale_all_dim:
        found["rope.scaling.yarn_log_multiplier"] = 0.1 * cfg.rope.mscale_all_dim
    return found


def mla(config: dict[str, Any]) -> dict[str, Any]:
    """Returns what newer files say of latent attention: the lengths are those of the cached latent."""
    lora, rotated = config["kv_lora_rank"], config["qk_rope_head_dim"]
    return {
        "attention.head_count_kv": 1,
        "attention.key_length": lora + rotated,
        "attention.value_length": lora,
        "attention.key_length_mla": config["qk_nope_head_dim"] + rotated,
        "attention.value_length_mla": config["v_head_dim"],
    }


def split_heads(config: dict[str, Any], source: Merged) -> Merged:
    """Returns the tensors with ``kv_b_proj`` as the converter of newer files splits it."""
    found: Merged = {}
    for name, numbers in source.items():
        if not name.endswith("kv_b_proj.weight"):
            found[name] = numbers
            continue
        heads = numbers.reshape(config["num_attention_heads"], -1, config["kv_lora_rank"])
        keys, values = np.split(heads, [config["qk_nope_head_dim"]], axis=1)
        found[name.replace("kv_b", "k_b")] = np.ascontiguousarray(keys.swapaxes(1, 2))
        found[name.replace("kv_b", "v_b")] = np.ascontiguousarray(values)
    return found


def tensors(config: dict[str, Any], source: Merged) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors under their names in the file, in float32."""
    architecture = config["architectures"][0]
    arch = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == ARCHITECTURES[architecture])
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    heads = config["num_attention_heads"], config.get("num_key_value_heads")
    for hf_name, numbers in merged(architecture, source):
        numbers = np.ascontiguousarray(numbers, np.float32)
        hf_name = hf_name.replace("e_score_correction_bias", "e_score_correction.bias")
        if hf_name.endswith("sinks"):
            hf_name += ".weight"
        if hf_name.endswith("shared_expert_gate.weight"):
            numbers = numbers[0]
        if architecture in ("MixtralForCausalLM", "GraniteMoeForCausalLM"):
            for n, letter in zip(heads, "qk", strict=True):
                if f".{letter}_proj." in hf_name:
                    numbers = permuted(numbers, n)
        name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        assert name is not None, hf_name
        yield name, numbers


def permuted(numbers: np.ndarray, heads: int) -> np.ndarray:
    """Returns rows as the converter's ``LlamaModel.permute`` orders them."""
    split = numbers.reshape(heads, 2, numbers.shape[0] // heads // 2, *numbers.shape[1:])
    return split.swapaxes(1, 2).reshape(numbers.shape)


def merged(architecture: str, source: Merged) -> Iterator[tuple[str, np.ndarray]]:
    """Yields tensors with those of all experts in one, and gate and up apart."""
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for name, numbers in source.items():
        if found := EXPERT.fullmatch(name):
            stacks.setdefault(f"{found[1]}.{found[3]}", {})[int(found[2])] = numbers
        elif architecture == "GptOssForCausalLM" and ".experts." in name:
            yield from gpt_oss_experts(name, numbers)
        elif name.endswith("input_linear.weight"):
            half = numbers.shape[1] // 2
            yield name.replace("input_linear", "experts.w1"), numbers[:, :half]
            yield name.replace("input_linear", "experts.w3"), numbers[:, half:]
        elif name.endswith("output_linear.weight"):
            yield name.replace("output_linear", "experts.w2"), numbers
        else:
            yield name, numbers
    for name, by_expert in stacks.items():
        yield name, np.stack([by_expert[e] for e in range(len(by_expert))])


def gpt_oss_experts(name: str, numbers: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    suffix = ".bias" if name.endswith("_bias") else ".weight"
    stem = name.removesuffix("_bias")
    if suffix == ".weight":
        numbers = numbers.swapaxes(1, 2)
    if "gate_up_proj" in stem:
        yield stem.replace("gate_up_proj", "gate_proj") + suffix, numbers[:, 0::2]
        yield stem.replace("gate_up_proj", "up_proj") + suffix, numbers[:, 1::2]
    else:
        yield stem + suffix, numbers
