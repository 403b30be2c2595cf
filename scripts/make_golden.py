"""Writes tests/golden: a tiny random checkpoint of each family by transformers, its logits and greedy tokens.

    python scripts/make_golden.py        (needs the parity extra)

The default tests compare with these, so that parity is checked where torch is not installed.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

OUT = Path(__file__).parent.parent / "tests" / "golden"
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
MODELS = {
    "qwen3_moe": transformers.Qwen3MoeConfig(**SHARED, **QWEN3),
    "mixtral": transformers.MixtralConfig(
        **SHARED, num_local_experts=5, intermediate_size=12, sliding_window=9
    ),
    "olmoe": transformers.OlmoeConfig(
        **SHARED, num_experts=6, intermediate_size=12, tie_word_embeddings=True
    ),
}


def write(name: str, config: transformers.PretrainedConfig) -> None:
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif parameter_name.endswith("gate.weight"):
                parameter.mul_(8.0)  # no near ties
    directory = OUT / name
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    prompt = np.random.default_rng(1).integers(1, config.vocab_size, LENGTH)
    tokens = torch.tensor(prompt)[None]
    with torch.no_grad():
        for _ in range(NEW):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
        logits = model(tokens).logits[0].numpy()
    np.savez_compressed(directory / "golden.npz", prompt=prompt, tokens=tokens[0].numpy(), logits=logits)
    print(name, json.dumps({"bytes": sum(f.stat().st_size for f in directory.iterdir())}))


if __name__ == "__main__":
    for name, config in MODELS.items():
        write(name, config)
