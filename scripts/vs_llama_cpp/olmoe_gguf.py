"""Writes an OLMoE checkpoint for llama.cpp. It runs under the interpreter that has ``gguf``, without jmoe."""

import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

# llama.cpp rotates OLMoE's heads by halves, in the same way as the checkpoint, so no row changes its place
PLAIN = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.gate",
}
STACKED = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
FLOAT32 = ("_norm.weight", "ffn_gate_inp.weight")  # what llama.cpp's own converter keeps in float32


def write_olmoe_gguf(directory: Path, path: Path, sizes: dict[str, Any]) -> None:
    """Writes the bfloat16 checkpoint of ``directory`` as one GGUF file, with the vocabulary's size only.

    Raises ValueError for a tensor that is absent or not bfloat16.

    directory: folder of the checkpoint.
    path: file that is written.
    sizes: fields of jmoe's ModelConfig.
    """
    gguf: Any = importlib.import_module("gguf")
    writer = gguf.GGUFWriter(path, "olmoe")
    add_sizes(writer, sizes)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    tensors, table = open_tensors(directory), dict(names(sizes["num_hidden_layers"], sizes["num_experts"]))
    for name, parts in table.items():
        missing = [part for part in parts if part not in tensors]
        if missing:
            raise ValueError(f"{directory}: no bfloat16 tensor {missing[0]!r}")
        shape = (*((len(parts),) if len(parts) > 1 else ()), *tensors[parts[0]].shape)
        kind, itemsize = ("F32", 4) if name.endswith(FLOAT32) else ("BF16", 2)
        nbytes = int(np.prod(shape)) * itemsize
        writer.add_tensor_info(
            name, shape, np.dtype(np.uint16), nbytes, getattr(gguf.GGMLQuantizationType, kind)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, parts in table.items():  # one at a time: the model need not fit in memory once more
        writer.write_tensor_data(values(name, [tensors[part] for part in parts]))
    writer.close()
    with path.open("rb") as file:  # otherwise the system writes gigabytes during the first measurements
        os.fsync(file.fileno())


def values(name: str, parts: list[np.ndarray]) -> np.ndarray:
    """Returns the file's values under ``name`` in the file's type: one tensor, or one of each expert."""
    bits = parts[0] if len(parts) == 1 else np.stack(parts)
    return (bits.astype(np.uint32) << 16).view(np.float32) if name.endswith(FLOAT32) else bits


def add_sizes(writer: Any, sizes: dict[str, Any]) -> None:
    writer.add_context_length(sizes["max_position_embeddings"])
    writer.add_embedding_length(sizes["hidden_size"])
    writer.add_block_count(sizes["num_hidden_layers"])
    writer.add_feed_forward_length(sizes["moe_intermediate_size"])
    writer.add_head_count(sizes["num_attention_heads"])
    writer.add_head_count_kv(sizes["num_key_value_heads"])
    writer.add_rope_freq_base(sizes["rope"]["rope_theta"])
    writer.add_layer_norm_rms_eps(sizes["rms_norm_eps"])
    writer.add_expert_count(sizes["num_experts"])
    writer.add_expert_used_count(sizes["num_experts_per_tok"])
    writer.add_vocab_size(sizes["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def names(layers: int, experts: int) -> Iterator[tuple[str, list[str]]]:
    """Yields each tensor of the file, with the checkpoint's tensor that fills it, or those of all experts."""
    yield "token_embd.weight", ["model.embed_tokens.weight"]
    yield "output_norm.weight", ["model.norm.weight"]
    yield "output.weight", ["lm_head.weight"]
    for i in range(layers):
        layer = f"model.layers.{i}"
        for name, part in PLAIN.items():
            yield f"blk.{i}.{name}.weight", [f"{layer}.{part}.weight"]
        for name, part in STACKED.items():
            yield f"blk.{i}.{name}.weight", [f"{layer}.mlp.experts.{e}.{part}.weight" for e in range(experts)]


def open_tensors(directory: Path) -> dict[str, np.ndarray]:
    """Returns the bfloat16 tensors of a directory's safetensors files as mapped uint16.

    The type is uint16 because numpy has no bfloat16.
    """
    tensors: dict[str, np.ndarray] = {}
    for path in sorted(directory.glob("*.safetensors")):
        data = np.memmap(path, np.uint8, "r")
        start = 8 + int(data[:8].view("<u8")[0])
        for name, info in json.loads(data[8:start].tobytes()).items():
            if info.get("dtype") == "BF16":
                first, last = (start + offset for offset in info["data_offsets"])
                tensors[name] = data[first:last].view(np.uint16).reshape(info["shape"])
    return tensors
