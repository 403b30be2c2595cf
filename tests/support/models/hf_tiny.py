"""Writes tiny random Hugging Face checkpoints with numpy alone: the models that tests load."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jmoe.models import get_family, model_config

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "eos_token_id": 0,
}
MIXTRAL, QWEN3, OLMOE = "MixtralForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM"
FAMILIES = (MIXTRAL, QWEN3, OLMOE)
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def hf_config(architecture: str = QWEN3, *, spelling: int = 5, dtype: str = "float32", **changes: Any):
    """Returns a tiny ``config.json`` as transformers 4 or 5 (``spelling``) writes it."""
    inner = {"moe_intermediate_size": 16} if architecture == QWEN3 else {"intermediate_size": 16}
    own = {"head_dim": 8, "norm_topk_prob": True} if architecture == QWEN3 else {}
    if spelling == 5:
        spelled = {"num_local_experts": 8, "dtype": dtype}
        spelled["rope_parameters"] = {"rope_type": "default", "rope_theta": 5000.0}
    else:
        experts = "num_local_experts" if architecture == MIXTRAL else "num_experts"
        spelled = {experts: 8, "torch_dtype": dtype, "rope_theta": 5000.0}
    return {"architectures": [architecture], **SIZES, **inner, **own, **spelled, **changes}


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor of the checkpoint, written down apart from the decoder's own code."""
    cfg = model_config(config | {"dtype": "float32"})  # shapes only: float16 is no dtype to compute in
    d, f, head = cfg.hidden_size, cfg.moe_intermediate_size, cfg.head_dim
    q, kv = cfg.num_attention_heads * head, cfg.num_key_value_heads * head
    norms = {"none": (0, 0), "head": (head, head), "full": (q, kv)}[cfg.qk_norm]
    by_ending = {
        "embed_tokens.weight": (cfg.vocab_size, d), "lm_head.weight": (cfg.vocab_size, d),
        "norm.weight": (d,), "layernorm.weight": (d,), "q_norm.weight": norms[:1], "k_norm.weight": norms[1:],
        "q_proj.weight": (q, d), "k_proj.weight": (kv, d), "v_proj.weight": (kv, d), "o_proj.weight": (d, q),
        "q_proj.bias": (q,), "k_proj.bias": (kv,), "v_proj.bias": (kv,), "o_proj.bias": (d,),
        ".gate.weight": (cfg.num_experts, d), "gate_proj.weight": (f, d), "up_proj.weight": (f, d),
        "down_proj.weight": (d, f), "w1.weight": (f, d), "w3.weight": (f, d), "w2.weight": (d, f),
    }  # fmt: skip
    names = [stored.name for stored in get_family(cfg.architecture).names(cfg)]
    return {n: next(s for e, s in reversed(by_ending.items()) if n.endswith(e)) for n in names}


def random_tensors(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    dtype = DTYPES[config.get("dtype") or config["torch_dtype"]]
    return {
        n: ((n.endswith("norm.weight") + 0.2 * rng.standard_normal(s)).astype(dtype))
        for n, s in tensor_shapes(config).items()
    }


def write_tokenizer(directory: Path) -> None:
    """Writes a ``tokenizer.json`` of one token a byte, 256 in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))


def write_checkpoint(
    directory: Path, config: dict, *, shards: int = 1, tensors: dict[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Writes ``config.json`` and the tensors (random ones by default); returns the tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = random_tensors(config) if tensors is None else tensors
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return tensors
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        save_file(part, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors
