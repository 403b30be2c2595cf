"""``save_hf``: writes a Decoder as a Hugging Face directory (``config.json``, ``model.safetensors``)."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from flax import nnx

from jmoe.checkpoint.checkpoint import all_finite
from jmoe.checkpoint.params import abstract_decoder, dotted, tensors_by_path
from jmoe.checkpoint.safetensors_file import DTYPES, encode_header
from jmoe.config.model import ModelConfig
from jmoe.config.moe import MoEConfig
from jmoe.models import get_family, model_config
from jmoe.models.decoder import Decoder, make_blueprint
from jmoe.models.weights import PLAIN, StoredTensor


def save_hf(model: Decoder, hf_config: dict[str, Any], directory: Path | str) -> None:
    """Writes the model under the family's per-expert names, in the dtypes of a model of ``hf_config``; if
    ``hf_config`` has the model's dtype, in each parameter's own dtype.

    The data starts 64-byte aligned. Each file is written under another name, then renamed, so it is never
    partial; it replaces a file of the same name. The function raises ValueError if ``hf_config`` is not this
    model's, a weight is NaN or Inf, or the family's checkpoints keep experts in another form than one tensor
    each.
    """
    directory = Path(directory)
    cfg = model_config(hf_config)
    _check_same(cfg, model.cfg)
    params = {dotted(keys): param for keys, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    table = tensors_by_path(get_family(cfg.architecture).names(cfg))
    _check_plain(cfg, table)
    dtypes = {
        path: spec.dtype
        for path, spec in abstract_decoder(make_blueprint(cfg, MoEConfig(), model.mesh))[1].items()
    }
    if cfg.dtype == model.cfg.dtype:
        dtypes = {path: _dtype_of(params[path]) for path in table}
    codes = {known: name for name, known in DTYPES.items()}
    entries = [
        (stored.name, codes[dtypes[path]], params[path].get_value().shape[len(stored.index) :])
        for path, parts in table.items()
        for stored in parts
    ]
    directory.mkdir(parents=True, exist_ok=True)

    def write_weights(file: BinaryIO) -> None:
        file.write(encode_header(entries))
        for path, parts in table.items():
            _write_param(file, path, np.asarray(params[path].get_value()), parts, dtypes[path])

    write_whole(directory / "model.safetensors", write_weights)
    text = json.dumps(hf_config, indent=2) + "\n"
    write_whole(directory / "config.json", lambda file: file.write(text.encode()))


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes ``path`` by ``write(file)`` under another name, flushes it to disk, then renames it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def canonical(values: np.ndarray) -> np.ndarray:
    """Returns a parameter's stored value in the checkpoint's dtype: uint16 is how some bfloat16 is stored."""
    return values.view(ml_dtypes.bfloat16) if values.dtype == np.uint16 else values


def _dtype_of(param: nnx.Param) -> np.dtype:
    """Returns the parameter's dtype in a checkpoint."""
    return canonical(np.empty(0, param.get_value().dtype)).dtype


def _write_param(
    file: BinaryIO, path: str, value: np.ndarray, tensors: list[StoredTensor], dtype: np.dtype
) -> None:
    values = canonical(value)
    for stored in tensors:
        tensor = np.ascontiguousarray(values[stored.index], dtype).reshape(-1)
        if not all_finite(tensor):
            raise ValueError(f"parameter {path!r} has NaN or Inf (as {dtype}); the file was not written")
        file.write(tensor.view(np.uint8).data)


def _check_plain(cfg: ModelConfig, table: dict[str, list[StoredTensor]]) -> None:
    for parts in table.values():
        for stored in parts:
            if stored.form != PLAIN or stored.expert is not None:
                raise ValueError(
                    f"{cfg.architecture} has {stored.name!r} in a form (stacked, transposed or quantised) "
                    "that is read and not written; convert the checkpoint that the model came from"
                )


def _check_same(cfg: ModelConfig, have: ModelConfig) -> None:
    for field in dataclasses.fields(cfg):
        value, model_value = getattr(cfg, field.name), getattr(have, field.name)
        if field.name != "dtype" and value != model_value:
            raise ValueError(f"hf_config gives {field.name} = {value!r}, the model has {model_value!r}")
