"""Facts of a checkpoint that ``config.json`` does not state, or states wrongly."""

import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jmoe.checkpoint.checkpoint import CHUNK, Checkpoint
from jmoe.checkpoint.converted.manifest import is_converted, read_manifest
from jmoe.checkpoint.quantised.formats import StoredParam
from jmoe.checkpoint.safetensors_file import DTYPES, TensorInfo
from jmoe.checkpoint.source import Source, source_of
from jmoe.config.model import ModelConfig
from jmoe.config.reading import named, unique_json
from jmoe.config.units import brief
from jmoe.models.fields import HFConfig

log = logging.getLogger(__name__)

NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
# The dtype to compute in, by the checkpoint's dtype. float32 holds every float16; bfloat16 would round them.
COMPUTED = {"float16": "float32"}
PRODUCT = re.compile(r"\.(\w+_proj|gate_up_E?2FD|down_E?DF)$")  # at the end of a parameter's path


def own_dtype(source: Source, hf: Mapping[str, Any]) -> Any:
    """Returns the dtype in which a model is computed by its own files: ``config.json`` states it, or the text
    model's config in that file; if neither does, it is the dtype of most of the tensors' bytes."""
    text = hf.get("text_config")
    for config in (hf, text if isinstance(text, Mapping) else {}):
        for name in ("dtype", "torch_dtype"):
            if config.get(name) is not None:
                stated = config[name]
                return COMPUTED.get(stated, stated) if isinstance(stated, str) else stated
    if is_converted(source.path):
        return read_manifest(source.path).dtype
    if not source.has_weights():
        return "float32"
    with source.open() as checkpoint:
        return computed_dtype(checkpoint.tensors)


def end_tokens(directory: Path, cfg: ModelConfig) -> frozenset[int]:
    """Returns the end-of-text ids of config.json and generation_config.json."""
    path = directory / "generation_config.json"
    if not path.is_file():
        return frozenset(cfg.eos_token_ids)
    try:
        values = unique_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    with named(path):
        if not isinstance(values, dict):
            raise ValueError(f"it must be a JSON object, it is {type(values).__name__}")
        ends = HFConfig(values).get("eos_token_id")
    ends = ends if isinstance(ends, tuple) else () if ends is None else (ends,)
    return frozenset([*cfg.eos_token_ids, *ends])


def computed_dtype(tensors: Mapping[str, TensorInfo]) -> str:
    """Returns the dtype to compute in, by the floating-point tensors alone: quantised ones are bytes."""
    sizes: Counter[str] = Counter()
    for info in tensors.values():
        if info.dtype in NAMES:
            sizes[NAMES[info.dtype]] += info.nbytes
    found = max(sizes, key=lambda name: sizes[name], default="float32")
    return "bfloat16" if found == "bfloat16" else "float32"


def is_wider(dtype: str, target: np.dtype) -> bool:
    """Returns whether a tensor's dtype (by its name in the file) has numbers that ``target`` cannot hold."""
    stored = DTYPES.get(dtype)
    return stored is not None and stored != target and target.itemsize < 4


def with_own_head(checkpoint: Checkpoint, cfg: ModelConfig) -> ModelConfig:
    """Returns ``cfg``, untied if the checkpoint has a head that differs from the embedding, whatever
    ``config.json`` says; transformers reads such a head too."""
    embed, head = embedding_names(checkpoint, cfg)
    tensors = checkpoint.tensors
    if not cfg.tie_word_embeddings or embed not in tensors or head not in tensors:
        return cfg
    if tensors[embed].shape == tensors[head].shape and _are_equal(checkpoint, embed, head, cfg.dtype):
        return cfg
    log.warning(
        "%s: %s ties the head to the embedding, but %r is another matrix: it is read as the head",
        checkpoint.directory, checkpoint.sizes_source, head,
    )  # fmt: skip
    return replace(cfg, tie_word_embeddings=False)


def embedding_names(checkpoint: Checkpoint, cfg: ModelConfig) -> tuple[str, str]:
    """Returns the names of the tensors of the embedding and of the head (if the head is tied: the name it
    would have)."""
    paths = {"embed": "", "lm_head": ""}
    for stored in checkpoint.names(replace(cfg, tie_word_embeddings=False)):
        if stored.path in paths:
            paths[stored.path] = stored.name
        if all(paths.values()):
            break
    return paths["embed"], paths["lm_head"]


def listed(checkpoint: Checkpoint, cfg: ModelConfig) -> list[StoredParam]:
    """Returns every tensor of the model; raises ValueError unless the checkpoint has exactly these.

    Some extra tensors are allowed and not read: the head of a tied model, which ``with_own_head`` has found
    equal to the embedding, those that the checkpoint ignores, scales of activations next to quantised
    weights, and biases of quantised weights that are zero.
    """
    found, quantisation = [], source_of(checkpoint.directory).quantisation()
    for stored in stored_tensors(checkpoint, cfg):
        for name in stored.names:
            if name not in checkpoint.tensors:  # fails at the first: an absurd num_hidden_layers ends here
                raise ValueError(
                    f"{checkpoint.directory}: tensor {brief(name)} of {cfg.architecture} is missing"
                )
        found.append(stored)
    expected = {name for stored in found for name in stored.names}
    spare = {bias for each in found if each.format is not None for bias in each.format.zero_biases(each.name)}
    _, head = embedding_names(checkpoint, cfg)
    for name, info in checkpoint.tensors.items():
        if name in expected:
            continue
        if name in spare:
            _check_zero(checkpoint, name)
            continue
        tied_head = cfg.tie_word_embeddings and name == head
        if not tied_head and not quantisation.is_unread(name) and not checkpoint.is_ignored(cfg, name):
            raise ValueError(
                f"{info.file}: tensor {brief(name)} is not one of {cfg.architecture} as "
                f"{checkpoint.sizes_source} has it"
            )
    return found


def stored_tensors(checkpoint: Checkpoint, cfg: ModelConfig) -> Iterator[StoredParam]:
    """Yields every tensor of the model, as this checkpoint names and stores it: a matrix shared by embedding
    and head may be stored under either name. Raises ValueError if the checkpoint contradicts itself."""
    embed, head = embedding_names(checkpoint, cfg)
    names, quantisation = checkpoint.tensors, source_of(checkpoint.directory).quantisation()
    as_head = cfg.tie_word_embeddings and embed not in names and head in names
    last, stored_format = None, None
    for stored in checkpoint.names(cfg):
        name = head if as_head and stored.name == embed else stored.name
        if name != last:  # the entries of a stacked tensor follow one another
            last = name
            stored_format = quantisation.format_of(name, names, is_product=is_product(stored.path))
            if stored_format is not None:
                stored_format = stored_format.of_contents(checkpoint, name)
        found = StoredParam(
            name, stored.path, stored.index, stored.expert, stored.form, stored.rows, stored_format
        )
        _check_entry(checkpoint, found)
        yield found


def _check_entry(checkpoint: Checkpoint, stored: StoredParam) -> None:
    """Raises ValueError if a stacked tensor is too short for the entry: an absurd number of experts in
    ``config.json`` ends here."""
    if (entry := stored.expert) is None:
        return
    for name in stored.names:
        info = checkpoint.tensors.get(name)
        if info is not None and entry >= (*info.shape, 0)[0]:
            raise ValueError(
                f"{info.file}: tensor {brief(name)} has no entry {entry}, which "
                f"{checkpoint.sizes_source} asks for: it is {list(info.shape)}"
            )


def is_product(path: str) -> bool:
    """Returns whether a parameter is a matrix of attention, of an expert or of an MLP."""
    return PRODUCT.search(path) is not None


def _check_zero(checkpoint: Checkpoint, name: str) -> None:
    """Raises ValueError unless a bias that the model does not have is zero."""
    info = checkpoint.tensors[name]
    size = math.prod(info.shape)
    numbers = np.empty(min(size, CHUNK), np.float32)
    for at in range(0, size, CHUNK):
        part = numbers[: size - at]
        checkpoint.read_run(name, at, part)
        if part.any():
            found = part[part != 0][0]
            raise ValueError(
                f"{info.file}: tensor {brief(name)} has the number {found:g}; the model has no such bias, so "
                "only zeros are read"
            )


def _are_equal(checkpoint: Checkpoint, first: str, second: str, dtype: str) -> bool:
    """Returns whether two tensors of the same shape hold the same numbers when read in ``dtype``."""
    size = int(np.prod(checkpoint.tensors[first].shape, dtype=np.int64))
    a, b = (np.empty(min(size, CHUNK), dtype) for _ in range(2))
    for at in range(0, size, CHUNK):
        count = min(CHUNK, size - at)
        checkpoint.read_run(first, at, a[:count])
        checkpoint.read_run(second, at, b[:count])
        if not np.array_equal(a[:count].view(np.uint8), b[:count].view(np.uint8)):
            return False
    return True
