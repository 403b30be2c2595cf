"""Writes a plain checkpoint again with quantised weights, in forms that ``--quantization`` does not make.

The matrices of attention and of the experts are quantised, rounded to nearest; everything else stays as it
is. The whole checkpoint is in memory meanwhile.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jmoe_kernels.quantised import Coding
from safetensors.numpy import load_file, save_file

from jmoe.checkpoint.quantised.quantise import quantise

Tensors = dict[str, np.ndarray]
CONFIG, WEIGHTS = "config.json", ("*.safetensors", "*.safetensors.index.json")
BFLOAT16, E4M3 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
BLOCK, LARGEST = 128, 448.0  # rows and columns of a block; E4M3's largest number
SUFFIX = "_proj.weight"  # of the matrices that are quantised


@dataclass(frozen=True)
class Stored:
    """A form of stored weights.

    config: function of the lengths of the rows -> ``quantization_config``.
    write: function of a matrix -> its tensors by what follows ``weight`` in their names.
    """

    config: Callable[[set[int]], dict[str, Any]]
    write: Callable[[np.ndarray], Tensors]


def write_quantised(plain: Path, directory: Path, stored: Stored) -> None:
    """Writes the checkpoint of ``plain`` to ``directory`` in a form; other files than weights are linked."""
    tensors, rows = {}, set()
    for path in sorted(plain.glob(WEIGHTS[0])):
        for name, values in load_file(path).items():
            if name.endswith(SUFFIX):
                rows.add(values.shape[-1])
                tensors |= {name + end: array for end, array in stored.write(values).items()}
            else:
                tensors[name] = values
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / CONFIG).read_text(encoding="utf-8"))
    config["quantization_config"] = stored.config(rows)
    (directory / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    for path in plain.iterdir():
        if path.name != CONFIG and not any(path.match(pattern) for pattern in WEIGHTS):
            (directory / path.name).symlink_to(path.resolve())


# ---- compressed-tensors


def int8_rows(values: np.ndarray) -> Tensors:
    """Returns W8A8's tensors: int8 with a bfloat16 scale for each row."""
    found = quantise(values, Coding("int8", None, "bfloat16"))
    return {"": found.values, "_scale": found.scales}


def int4_groups(group: int) -> Callable[[np.ndarray], Tensors]:
    """Returns the writer of W4A16's tensors, with groups that are no longer than a row."""

    def write(values: np.ndarray) -> Tensors:
        found = quantise(values, Coding("int4", min(group, values.shape[-1]), "bfloat16"))
        words = np.ascontiguousarray(found.values).view("<i4")
        return {"_packed": words, "_scale": found.scales, "_shape": np.array(values.shape, np.int64)}

    return write


def scheme(bits: int, group: int | None, rounds_activations: bool) -> dict[str, Any]:
    """Returns a group of ``config_groups``, of weights with a scale for each group or row."""
    weights = {
        "num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, "group_size": group,
        "strategy": "group" if group else "channel", "actorder": None, "block_structure": None,
        "observer": "minmax", "observer_kwargs": {},
    }  # fmt: skip
    tokens = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    return {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": tokens if rounds_activations else None,
        "output_activations": None,
    }


def compressed(form: str, groups: dict[str, Any]) -> dict[str, Any]:
    """Returns a ``quantization_config`` of compressed-tensors."""
    return {
        "quant_method": "compressed-tensors", "format": form, "config_groups": groups,
        "ignore": ["lm_head", "re:.*mlp.gate$"], "quantization_status": "compressed",
        "kv_cache_scheme": None,
    }  # fmt: skip


def int4_config(group: int) -> Callable[[set[int]], dict[str, Any]]:
    """Returns the config of W4A16: experts whose rows are shorter than a group have groups of a row."""

    def config(rows: set[int]) -> dict[str, Any]:
        groups = {"group_0": scheme(4, group, False)}
        if short := [length for length in rows if length < group]:
            if len(short) > 1:
                raise ValueError(f"rows of {sorted(short)} numbers are shorter than groups of {group}")
            groups["group_0"]["targets"] = ["re:.*self_attn.*", "re:.*(gate|up)_proj$"]
            groups["group_1"] = scheme(4, short[0], False) | {"targets": ["re:.*down_proj$"]}
        return compressed("pack-quantized", groups)

    return config


W8A8 = Stored(lambda rows: compressed("int-quantized", {"group_0": scheme(8, None, True)}), int8_rows)
INT4_32 = Stored(int4_config(32), int4_groups(32))
INT4_128 = Stored(int4_config(128), int4_groups(128))


# ---- fp8 in blocks


def fp8_blocks(values: np.ndarray) -> Tensors:
    """Returns E4M3 numbers and a float32 scale for each block, of which the last ones may be cut."""
    numbers = values.astype(np.float32)
    padded = np.pad(numbers, [(0, -n % BLOCK) for n in numbers.shape])
    rows, columns = (n // BLOCK for n in padded.shape)
    blocks = padded.reshape(rows, BLOCK, columns, BLOCK)
    scales = (np.abs(blocks).max(axis=(1, 3)) / LARGEST).astype(np.float32)
    safe = np.where(scales == 0, 1, scales)[:, None, :, None]
    codes = np.clip(blocks / safe, -LARGEST, LARGEST).astype(E4M3).reshape(padded.shape)
    return {
        "": np.ascontiguousarray(codes[: numbers.shape[0], : numbers.shape[1]]),
        "_scale_inv": scales,
    }


FP8_BLOCKS = Stored(
    lambda rows: {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": ["lm_head", "model.embed_tokens", "mlp.gate"],
    },
    fp8_blocks,
)  # fmt: skip
