"""Writes weights as compressed-tensors stores them, and says what they mean, apart from the readers.

Each writer draws codes and scales at random and returns the tensors with the numbers that the published
definition gives them: in float64 and rounded once to float32, unless the definition divides in float32.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import SingleDeviceSharding
from jmoe_kernels.quantised import Coding, dequantised
from safetensors.numpy import save_file
from support.models import hf_tiny

from jmoe.checkpoint.hf.reader import HFCheckpoint
from jmoe.checkpoint.params import ParamSpec
from jmoe.checkpoint.quantised.formats import StoredParam
from jmoe.checkpoint.quantised.quantisation import parsed
from jmoe.checkpoint.slices import check_shapes, read_slice

BFLOAT16, E4M3 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
Tensors = dict[str, np.ndarray]  # by what follows ``weight`` in the names of a module's tensors
Writer = Callable[[np.random.Generator, tuple[int, int]], tuple[Tensors, np.ndarray]]


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Returns rows of codes as words of 32 bits, through one long integer per row."""
    size = 4 * -(-codes.shape[1] * bits // 32)
    rows = [sum(int(code) << bits * i for i, code in enumerate(row)) for row in codes]
    return np.stack([np.frombuffer(row.to_bytes(size, "little"), "<i4") for row in rows])


def spread(grid: np.ndarray, shape: tuple[int, int], block: tuple[int, int]) -> np.ndarray:
    """Returns the number of a grid that belongs to each place of a weight."""
    rows, columns = (np.arange(n) // b for n, b in zip(shape, block, strict=True))
    return grid.astype(np.float64).reshape(grid.shape if grid.ndim == 2 else (1, 1))[rows][:, columns]


def grid_of(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, ...]:
    return tuple(-(-n // b) for n, b in zip(shape, block, strict=True))


def scales_of(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return rng.uniform(0.002, 0.02, shape).astype(dtype)


def e2m1(code: int) -> float:
    """Returns the number of a nibble: a sign, two bits of exponent, one of mantissa."""
    exponent, half = code >> 1 & 3, (code & 1) / 2
    return (-1) ** (code >> 3) * (half if exponent == 0 else (1 + half) * 2.0 ** (exponent - 1))


def halves(codes: np.ndarray) -> np.ndarray:
    """Returns two nibbles per byte, the first in the low bits."""
    return (codes[:, 0::2] + 16 * codes[:, 1::2]).astype(np.uint8)


def write_packed(
    rng: np.random.Generator,
    shape: tuple[int, int],
    bits: int = 4,
    strategy: str = "group",
    group: int = 32,
    symmetric: bool = True,
    dtype: Any = BFLOAT16,
) -> tuple[Tensors, np.ndarray]:
    block = {"group": (1, group), "channel": (1, shape[1]), "tensor": shape}[strategy]
    grid = grid_of(shape, block)
    middle = 2 ** (bits - 1)
    codes, scales = rng.integers(0, 2 * middle, shape), scales_of(rng, grid, dtype)
    zeros = np.full(grid, middle) if symmetric else rng.integers(0, 2 * middle, grid)
    tensors = {
        "_packed": packed(codes, bits),
        "_scale": scales.reshape(-1) if strategy == "tensor" else scales,
        "_shape": np.array(shape, np.int64),
    }
    if not symmetric:
        tensors["_zero_point"] = np.ascontiguousarray(packed(zeros.T, bits).T)
    numbers = (codes - spread(zeros, shape, block)) * spread(scales, shape, block)
    return tensors, numbers.astype(np.float32)


def write_bytes(
    rng: np.random.Generator,
    shape: tuple[int, int],
    block: tuple[int | None, int | None] = (1, None),
    floats: bool = False,
    symmetric: bool = True,
    dtype: Any = BFLOAT16,
    static: bool = False,
) -> tuple[Tensors, np.ndarray]:
    """Writes int8 or E4M3, with a scale for each block; ``static`` adds a scale of activations."""
    filled = tuple(b or n for b, n in zip(block, shape, strict=True))
    grid = grid_of(shape, filled)  # pyright: ignore[reportArgumentType]
    if floats:
        codes = rng.uniform(-40, 40, shape).astype(E4M3)
    else:
        codes = rng.integers(-128, 128, shape).astype(np.int8)
    scales, zeros = scales_of(rng, grid, dtype), rng.integers(-128, 128, grid).astype(np.int8)
    as_stored = (lambda a: a.reshape(-1)) if block == (None, None) else (lambda a: a)
    tensors = {"": codes, "_scale": as_stored(scales)}
    if not symmetric:
        tensors["_zero_point"] = as_stored(zeros)
    offsets = 0 if symmetric else spread(zeros, shape, filled)  # pyright: ignore[reportArgumentType]
    numbers = (codes.astype(np.float64) - offsets) * spread(scales, shape, filled)  # pyright: ignore
    if static:
        tensors["/input_scale"] = np.array([0.5], BFLOAT16)
    return tensors, numbers.astype(np.float32)


def write_nvfp4(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[Tensors, np.ndarray]:
    codes = rng.integers(0, 16, shape)
    scales = rng.uniform(20, 400, (shape[0], shape[1] // 16)).astype(E4M3)
    whole = rng.uniform(8000, 20000, 1).astype(np.float32)
    each = np.repeat(scales.astype(np.float32) / whole, 16, axis=1)
    numbers = np.vectorize(e2m1, otypes=[np.float32])(codes) * each
    tensors = {"_packed": halves(codes), "_scale": scales, "_global_scale": whole}
    return tensors | {"/input_global_scale": np.array([3.0], np.float32)}, numbers


def write_mx(
    rng: np.random.Generator, shape: tuple[int, int], floats: bool = False
) -> tuple[Tensors, np.ndarray]:
    """Writes MXFP4, or MXFP8 in E4M3."""
    scales = rng.integers(116, 122, (shape[0], shape[1] // 32)).astype(np.uint8)
    each = 2.0 ** (np.repeat(scales, 32, axis=1).astype(np.float64) - 127)
    if floats:
        numbers = rng.uniform(-4, 4, shape).astype(E4M3)
        return {"": numbers, "_scale": scales}, (numbers.astype(np.float64) * each).astype(np.float32)
    codes = rng.integers(0, 16, shape)
    numbers = (np.vectorize(e2m1, otypes=[np.float64])(codes) * each).astype(np.float32)
    return {"_packed": halves(codes), "_scale": scales}, numbers


@dataclass(frozen=True)
class Case:
    """One way to store weights.

    format: value of ``format``.
    weights: table ``weights`` of the group.
    write: writer of one weight.
    """

    format: str
    weights: dict[str, Any]
    write: Writer

    def config(self, *ignore: str, **changes: Any) -> dict[str, Any]:
        """Returns the ``quantization_config``."""
        group = {"targets": ["Linear"], "weights": self.weights, "input_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": self.format,
            "config_groups": {"group_0": group},
            "ignore": list(ignore),
            "quantization_status": "compressed",
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            **changes,
        }


def _ints(bits: int, strategy: str, group: int | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "num_bits": bits, "type": "int", "strategy": strategy, "group_size": group, "symmetric": True,
        "dynamic": False, "actorder": None, "block_structure": None, "observer": "minmax",
        "observer_kwargs": {}, **changes,
    }  # fmt: skip


def _floats(bits: int, strategy: str, group: int | None = None, **changes: Any) -> dict[str, Any]:
    return _ints(bits, strategy, group, type="float", **changes)


PACK, INT, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
PACKED = {
    "int4 g32": Case(PACK, _ints(4, "group", 32), write_packed),
    "int4 g32, weights ordered": Case(PACK, _ints(4, "group", 32, actorder="weight"), write_packed),
    "int4 g16, float32": Case(PACK, _ints(4, "group", 16), partial(write_packed, group=16, dtype=np.float32)),
    "int4 g16, float16": Case(PACK, _ints(4, "group", 16), partial(write_packed, group=16, dtype=np.float16)),
    "int4 a row": Case(PACK, _ints(4, "channel"), partial(write_packed, strategy="channel")),
    "int4 in all": Case(PACK, _ints(4, "tensor"), partial(write_packed, strategy="tensor")),
    "int4 g32 with zeros": Case(
        PACK, _ints(4, "group", 32, symmetric=False), partial(write_packed, symmetric=False)
    ),
    "int4 a row with zeros": Case(
        PACK,
        _ints(4, "channel", symmetric=False),
        partial(write_packed, strategy="channel", symmetric=False, dtype=np.float16),
    ),
    "int8 g32": Case(PACK, _ints(8, "group", 32), partial(write_packed, bits=8)),
    "int8 g32 with zeros": Case(
        PACK, _ints(8, "group", 32, symmetric=False), partial(write_packed, bits=8, symmetric=False)
    ),
    "int8 packed a row": Case(PACK, _ints(8, "channel"), partial(write_packed, bits=8, strategy="channel")),
}
BYTES = {
    "W8A8": Case(INT, _ints(8, "channel"), write_bytes),
    "W8A8 in all": Case(INT, _ints(8, "tensor"), partial(write_bytes, block=(None, None), dtype=np.float32)),
    "W8 g32": Case("naive-quantized", _ints(8, "group", 32), partial(write_bytes, block=(1, 32))),
    "W8 a row with zeros": Case(
        INT, _ints(8, "channel", symmetric=False), partial(write_bytes, symmetric=False)
    ),
    "W8 in blocks": Case(
        INT, _ints(8, "block", block_structure=[24, 40]), partial(write_bytes, block=(24, 40))
    ),
}
FP8 = {
    "FP8 a row": Case(FLOAT, _floats(8, "channel"), partial(write_bytes, floats=True)),
    "FP8 in all, static": Case(
        FLOAT, _floats(8, "tensor"), partial(write_bytes, block=(None, None), floats=True, static=True)
    ),
    "FP8 in blocks": Case(
        FLOAT,
        _floats(8, "block", block_structure=[24, 40]),
        partial(write_bytes, block=(24, 40), floats=True, dtype=np.float32),
    ),
    "FP8 naive": Case("naive-quantized", _floats(8, "channel"), partial(write_bytes, floats=True)),
}
BYTE_SCALE = {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
SMALL_FLOATS = {
    "NVFP4": Case(
        "nvfp4-pack-quantized",
        _floats(4, "tensor_group", 16, scale_dtype="torch.float8_e4m3fn"),
        write_nvfp4,
    ),
    "MXFP4": Case("mxfp4-pack-quantized", _floats(4, "group", 32, **BYTE_SCALE), write_mx),
    "MXFP8": Case("mxfp8-quantized", _floats(8, "group", 32, **BYTE_SCALE), partial(write_mx, floats=True)),
}
CASES = PACKED | BYTES | FP8 | SMALL_FLOATS


def named(module: str, tensors: Tensors) -> dict[str, np.ndarray]:
    """Returns the tensors of a module by their names in a checkpoint."""
    return {
        f"{module}.{key[1:]}" if key.startswith("/") else f"{module}.weight{key}": array
        for key, array in tensors.items()
    }


def model_config(**changes: Any) -> dict[str, Any]:
    """Returns a tiny ``config.json`` with rows of 64 numbers."""
    return hf_tiny.hf_config(hidden_size=64, head_dim=16, moe_intermediate_size=64, **changes)


def is_product(name: str) -> bool:
    return name.endswith("_proj.weight")


def write_models(
    directory: Path,
    case: Case,
    quantisation: dict[str, Any],
    is_quantised: Callable[[str], bool] = is_product,
) -> tuple[Path, Path]:
    """Writes a tiny Qwen3-MoE quantised and its plain copy in float32; returns their directories."""
    config = model_config()
    plain, stored = hf_tiny.random_tensors(config), {}
    rng = np.random.default_rng(1)
    for name, tensor in plain.items():
        if is_quantised(name):
            tensors, plain[name] = case.write(rng, tensor.shape)
            stored |= named(name.removesuffix(".weight"), tensors)
        else:
            stored[name] = tensor
    hf_tiny.write_checkpoint(directory / "plain", config, tensors=plain)
    hf_tiny.write_checkpoint(
        directory / "stored", config | {"quantization_config": quantisation}, tensors=stored
    )
    return directory / "stored", directory / "plain"


def write_config(directory: Path, quantisation: Any) -> None:
    """Writes another ``quantization_config`` beside the same tensors."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantisation}))


@contextmanager
def stored_weight(
    directory: Path, tensors: Tensors, config: dict[str, Any], shape: tuple[int, ...] = (48, 160)
) -> Iterator[tuple[HFCheckpoint, StoredParam, ParamSpec]]:
    """Writes one weight; yields its checkpoint, and the weight and its parameter by the configuration."""
    name = "model.layers.0.self_attn.q_proj"
    save_file(named(name, tensors), directory / "model.safetensors")
    rules = parsed(config, directory / "config.json")
    with HFCheckpoint(directory) as checkpoint:
        stored = rules.format_of(f"{name}.weight", checkpoint.tensors, is_product=True)
        param = StoredParam(f"{name}.weight", "p", format=stored)
        float32, where = np.dtype(np.float32), SingleDeviceSharding(jax.devices()[0])
        spec = ParamSpec("p", shape, float32, float32, where)
        yield checkpoint, param, spec


def read_weight(
    directory: Path, tensors: Tensors, config: dict[str, Any], shape: tuple[int, ...] = (48, 160)
) -> tuple[Coding, np.ndarray]:
    """Returns how a weight is kept in memory and its numbers, both as it is kept and read into plain numbers,
    which are the same."""
    with stored_weight(directory, tensors, config, shape) as (checkpoint, param, spec):
        check_shapes(checkpoint, {"p": [param]}, {"p": spec})
        assert param.format is not None
        coded = jax.tree.map(
            lambda array: np.empty(array.shape, array.dtype), param.format.coding.shapes(shape)
        )
        plain = np.empty(shape, np.float32)
        read_slice(checkpoint, param, coded)
        read_slice(checkpoint, param, plain)
    np.testing.assert_array_equal(dequantised(coded), plain)
    return coded.coding, plain
