"""Slices of parameters as checkpoints store them, written apart from the reader; and families that do so."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from support.models import hf_tiny

from jmoe.config.model import ModelConfig
from jmoe.models import FAMILIES, Family
from jmoe.models.weights import Form, StoredTensor

HALVES = Form("halves")
TURNED, TURNED_HALVES, TURNED_TURNS = (Form(rows, True) for rows in ("plain", "halves", "alternate"))
TURNS = Form("alternate")
# of gate-and-up and of down
LAYOUTS = {
    "granite": (HALVES, Form()),
    "llama4": (TURNED_HALVES, TURNED),
    "gpt-oss": (TURNED_TURNS, TURNED),
    "mxfp4": (TURNS, Form()),  # its numbers are quantised
}


def as_stored(values: np.ndarray, form: Form) -> np.ndarray:
    """Returns what a checkpoint holds of a slice, unquantised."""
    if form.row_layout == "halves":
        values = np.concatenate([values[0], values[1]])
    elif form.row_layout == "alternate":
        gate, up = values
        values = np.stack([row for pair in zip(gate, up, strict=True) for row in pair])
    return np.ascontiguousarray(values.T if form.is_transposed else values)


def decoded(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns MXFP4 in float64, number by number: sign, two bits of exponent, one of mantissa."""
    out = np.empty((*scales.shape, 32))
    for at in np.ndindex(out.shape):
        byte = int(blocks[(*at[:-1], at[-1] // 2)])
        bits = byte >> 4 if at[-1] % 2 else byte & 15
        exponent, half = bits >> 1 & 3, bits & 1
        magnitude = half / 2 if exponent == 0 else (1 + half / 2) * 2.0 ** (exponent - 1)
        out[at] = (-1.0 if bits >> 3 else 1.0) * magnitude * 2.0 ** (int(scales[at[:-1]]) - 127)
    return out.reshape(*scales.shape[:-1], -1)


def stacking(layout: str) -> Family:
    """Returns Qwen3-MoE as if its makers stored all experts of a layer in one tensor, in one of LAYOUTS."""
    plain, (gate_up, down) = FAMILIES[hf_tiny.QWEN3], LAYOUTS[layout]

    def names(cfg: ModelConfig) -> Iterator[StoredTensor]:
        without = replace(cfg, num_experts=1, num_experts_per_tok=1)
        yield from (s for s in plain.names(without) if ".experts." not in s.path)
        for i in range(cfg.num_hidden_layers):
            theirs, ours = f"model.layers.{i}.mlp.experts", f"layers.{i}.moe.experts"
            for e in range(cfg.num_experts):
                yield StoredTensor(f"{theirs}.gate_up_proj", f"{ours}.gate_up_E2FD", (e,), e, gate_up)
                yield StoredTensor(f"{theirs}.down_proj", f"{ours}.down_EDF", (e,), e, down)

    return replace(
        plain,
        names=names,
        is_ignored=lambda cfg, name: name.startswith(f"model.layers.{cfg.num_hidden_layers}."),
    )


def write_both(root, layout: str, dtype: str = "float32") -> tuple[dict, dict[str, np.ndarray]]:
    """Writes ``root/stacked`` in that layout and ``root/plain`` with the same values.

    Returns the config and the tensors of ``root/stacked``.
    """
    config = hf_tiny.hf_config(moe_intermediate_size=32, dtype=dtype)
    plain, rng = hf_tiny.random_tensors(config), np.random.default_rng(1)
    stacked = {n: t for n, t in plain.items() if ".experts." not in n}
    for i in range(config["num_hidden_layers"]):
        theirs = f"model.layers.{i}.mlp.experts"
        for name, form in zip(("gate_up_proj", "down_proj"), LAYOUTS[layout], strict=True):
            if layout == "mxfp4":
                rows = 64 if name == "gate_up_proj" else 32
                blocks = rng.integers(0, 256, (8, rows, 1, 16), np.uint8)
                scales = rng.integers(118, 126, (8, rows, 1), np.uint8)
                stacked |= {f"{theirs}.{name}_blocks": blocks, f"{theirs}.{name}_scales": scales}
                values = decoded(blocks, scales).astype(hf_tiny.DTYPES[dtype])
                if name == "gate_up_proj":
                    values = np.stack([values[:, 0::2], values[:, 1::2]], axis=1)
            elif name == "gate_up_proj":
                values = np.stack(
                    [[plain[f"{theirs}.{e}.{n}_proj.weight"] for n in ("gate", "up")] for e in range(8)]
                )
            else:
                values = np.stack([plain[f"{theirs}.{e}.down_proj.weight"] for e in range(8)])
            for e in range(8):
                parts = (
                    zip(("gate", "up"), values[e], strict=True) if values.ndim == 4 else [("down", values[e])]
                )
                plain |= {f"{theirs}.{e}.{n}_proj.weight": np.ascontiguousarray(part) for n, part in parts}
            if layout != "mxfp4":
                stacked[f"{theirs}.{name}"] = np.stack([as_stored(values[e], form) for e in range(8)])
    quantised = {"quantization_config": {"quant_method": "mxfp4"}} if layout == "mxfp4" else {}
    hf_tiny.write_checkpoint(root / "plain", config, tensors=plain)
    hf_tiny.write_checkpoint(root / "stacked", config | quantised, tensors=stacked)
    return config | quantised, stacked
