"""A model in one GGUF file, or split into several, as a checkpoint."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any

from jmoe.checkpoint.checkpoint import Checkpoint
from jmoe.checkpoint.gguf.blocks import BLOCKS, FORMATS, READ
from jmoe.checkpoint.gguf.file import GgufHeader, open_gguf
from jmoe.checkpoint.gguf.names import tensor_names
from jmoe.checkpoint.quantised.formats import Format
from jmoe.checkpoint.quantised.quantisation import Quantisation
from jmoe.checkpoint.safetensors_file import ITEM_SIZES, TensorInfo, open_regular
from jmoe.config.model import ModelConfig
from jmoe.config.units import brief
from jmoe.models.weights import StoredTensor

PART = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", re.IGNORECASE)
VECTORS = ("ffn_gate_inp_shexp.weight",)  # matrices of one row that are stored as vectors


@dataclass(frozen=True)
class ByType(Quantisation):
    """The formats of a GGUF file: each tensor has its own type."""

    source: str = "GGUF"

    @property
    def is_plain(self) -> bool:
        return False

    def format_of(
        self, name: str, tensors: Mapping[str, TensorInfo], *, is_product: bool = False
    ) -> Format | None:
        return FORMATS.get(tensors[name].dtype) if name in tensors else None


@dataclass(frozen=True)
class GgufHeaders:
    """The headers of a GGUF file and of the files that follow it in a split model.

    path: the first file.
    metadata: values of the first file by key.
    tensors: every tensor by its name.
    files: size in bytes and time of the last change, in ns, of each file.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    files: Mapping[Path, tuple[int, int]]


def read_headers(path: Path) -> GgufHeaders:
    """Parses the headers of a model's files; raises ValueError naming the file for anything out of order."""
    metadata: dict[str, Any] = {}
    tensors: dict[str, TensorInfo] = {}
    files: dict[Path, tuple[int, int]] = {}
    for number, part in enumerate(parts_of(path)):
        file, header = open_gguf(part)
        with file:
            files[part] = _state(file)
        if number == 0:
            metadata = header.metadata
        _check_part(part, header, number, metadata.get("split.count", 1))
        for name, info in header.tensors.items():
            if name in tensors:
                raise ValueError(f"{part}: tensor {brief(name)} is also in {tensors[name].file.name}")
            tensors[name] = _readable(name, info)
    total = metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise ValueError(f"{path}: the files have {len(tensors)} tensors, the first says {total}")
    return GgufHeaders(path, metadata, tensors, files)


class GgufCheckpoint(Checkpoint):
    """The tensors of a GGUF model whose headers were read before."""

    item_sizes = ITEM_SIZES | {kind: nbytes for kind, (_, nbytes) in BLOCKS.items()}

    def __init__(self, headers: GgufHeaders):
        """Opens the files; raises ValueError naming one that was changed since its header was read."""
        self._headers = headers
        super().__init__(headers.path)

    def _open(self) -> dict[str, TensorInfo]:
        for path, state in self._headers.files.items():
            self._files[path] = open_regular(path)
            if _state(self._files[path]) != state:
                raise ValueError(f"{path}: was changed while the model was read")
        return dict(self._headers.tensors)

    @property
    def sizes_source(self) -> str:
        return f"the metadata of {self.directory.name}"

    def names(self, cfg: ModelConfig) -> Iterator[StoredTensor]:
        yield from tensor_names(cfg, self.tensors)

    def is_ignored(self, cfg: ModelConfig, name: str) -> bool:
        """Returns whether the tensor is of a layer that predicts further tokens: the decoder has none."""
        number = re.match(r"blk\.([0-9]{1,9})\.", name)
        return number is not None and int(number[1]) >= cfg.num_hidden_layers


def parts_of(path: Path) -> list[Path]:
    """Returns the files of a model, of which ``path`` is the first; raises ValueError if it is another one or
    if one is absent."""
    part = PART.fullmatch(path.name)
    if part is None:
        return [path]
    stem, number, count = part.groups()
    files = [path.with_name(f"{stem}-{i:05}-of-{count}{path.suffix}") for i in range(1, int(count) + 1)]
    if number != "00001":
        raise ValueError(
            f"{path}: is part {int(number)} of {int(count)}; give the first, {stem}-00001-of-{count}"
        )
    for file in files:
        if not file.is_file():
            raise ValueError(f"{path}: part {brief(file.name)} is missing (incomplete download?)")
    return files


def _state(file: FileIO) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def _check_part(path: Path, header: GgufHeader, number: int, count: int) -> None:
    own = header.metadata.get("split.no", 0)
    if own != number:
        raise ValueError(f"{path}: says that it is part {own} from 0, its name says {number}")
    if number == 0 and count != len(parts_of(path)):
        raise ValueError(
            f"{path}: is the first of {count} parts; its name must end in -00001-of-{count:05}.gguf"
        )


def _readable(name: str, info: TensorInfo) -> TensorInfo:
    """Returns the tensor as parameters have it; raises ValueError if its type is not read."""
    if info.dtype not in READ:
        read = ", ".join(READ)
        raise ValueError(
            f"{info.file}: tensor {brief(name)} has type {info.dtype}, which is not read; {read} are"
        )
    is_row = name.endswith(VECTORS) and len(info.shape) == 1
    return replace(info, shape=(1, *info.shape)) if is_row else info
