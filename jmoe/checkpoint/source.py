"""The source of a model: a directory of files, Hugging Face's or a converted one, or a GGUF file.

Everything that asks what kind of model it has before it reads it asks here.
"""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from jmoe.checkpoint.checkpoint import Checkpoint
from jmoe.checkpoint.converted.manifest import is_converted
from jmoe.checkpoint.gguf.checkpoint import PART, ByType, GgufCheckpoint, GgufHeaders, read_headers
from jmoe.checkpoint.gguf.config import config_values
from jmoe.checkpoint.gguf.tokenizer import has_vocabulary, tokenizer_config, tokenizer_json, why_unread
from jmoe.checkpoint.hf.reader import INDEX, HFCheckpoint
from jmoe.checkpoint.quantised.quantisation import Quantisation, read_quantisation
from jmoe.checkpoint.safetensors_file import read_json
from jmoe.config.reading import named

GGUF = ".gguf"
PROJECTOR = re.compile(r"mmproj[-_.].*|.*[-_.]mmproj([-_.].*)?", re.IGNORECASE)  # of images, no model
CONFIG, TOKENIZER, TOKENIZER_CONFIG = "config.json", "tokenizer.json", "tokenizer_config.json"


class Source(Protocol):
    """A model's files.

    path: the directory, or the GGUF file.
    config_path: file with the model's sizes, for messages.
    """

    @property
    def path(self) -> Path: ...

    @property
    def config_path(self) -> Path: ...

    def config(self) -> dict[str, Any]:
        """Returns what ``config.json`` says; raises ValueError naming the file."""
        ...

    def has_weights(self) -> bool:
        """Returns whether there are tensors to open."""
        ...

    def open(self) -> Checkpoint: ...

    def quantisation(self) -> Quantisation:
        """Returns the formats of the weights; raises ValueError, naming file and key, for one that is not
        read."""
        ...

    def text_path(self, name: str) -> Path:
        """Returns the path of a text that ``read_text`` returns, for messages."""
        ...

    def has_tokenizer(self) -> bool: ...

    def read_text(self, name: str) -> bytes | None:
        """Returns one of the texts of the tokenizer and its template, such as ``tokenizer.json``, or None if
        the model has no such text."""
        ...


@dataclass(frozen=True)
class Directory:
    """A directory as Hugging Face publishes it, or as ``convert`` writes it."""

    path: Path

    @property
    def config_path(self) -> Path:
        return self.path / CONFIG

    def config(self) -> dict[str, Any]:
        return read_json(self.config_path)

    def has_weights(self) -> bool:
        return (self.path / INDEX).exists() or any(self.path.glob("*.safetensors"))

    def open(self) -> HFCheckpoint:
        return HFCheckpoint(self.path)

    def quantisation(self) -> Quantisation:
        return read_quantisation(self.path)

    def text_path(self, name: str) -> Path:
        return self.path / name

    def has_tokenizer(self) -> bool:
        return (self.path / TOKENIZER).is_file()

    def read_text(self, name: str) -> bytes | None:
        path = self.path / name
        return path.read_bytes() if path.is_file() else None


@dataclass(frozen=True)
class WithoutWeights(Directory):
    """A directory that may hold no weights, or not all of them yet: its configuration is read alone."""

    def has_weights(self) -> bool:
        return False


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file, the first one of a split model. Its headers are parsed once, when they are first needed.

    A tokenizer of a kind that is not read is taken from the ``tokenizer.json`` next to the file.
    """

    path: Path

    @property
    def config_path(self) -> Path:
        return self.path

    def config(self) -> dict[str, Any]:
        headers = self._headers
        with named(self.path):
            return config_values(headers.metadata, headers.tensors)

    def has_weights(self) -> bool:
        return True

    def open(self) -> GgufCheckpoint:
        return GgufCheckpoint(self._headers)

    def quantisation(self) -> Quantisation:
        return ByType()

    def text_path(self, name: str) -> Path:
        return self.path

    def has_tokenizer(self) -> bool:
        return has_vocabulary(self._headers.metadata) or (self.path.parent / TOKENIZER).is_file()

    def read_text(self, name: str) -> bytes | None:
        metadata = self._headers.metadata
        why, beside = why_unread(metadata), Directory(self.path.parent)
        if why is not None and beside.has_tokenizer():
            return beside.read_text(name)
        if not has_vocabulary(metadata) or name not in (TOKENIZER, TOKENIZER_CONFIG):
            return None
        if name == TOKENIZER and why is not None:
            text = f"the tokenizer is not read: {why}. Put the model's {TOKENIZER} next to the file"
            raise ValueError(f"{self.path}: {text}")
        make = tokenizer_json if name == TOKENIZER else tokenizer_config
        with named(self.path):
            return json.dumps(make(metadata), ensure_ascii=False).encode(errors="replace")

    @cached_property
    def _headers(self) -> GgufHeaders:
        return read_headers(self.path)


ModelFiles = Path | str | Source


def source_of(model: ModelFiles) -> Source:
    """Returns the files of a model by its path, or as they were found before; raises ValueError for a
    directory with several GGUF models."""
    if not isinstance(model, Path | str):
        return model
    path = model_path(Path(model))
    return GgufFile(path) if is_gguf(path) else Directory(path)


def model_path(path: Path) -> Path:
    """Returns the GGUF file of a directory that holds one such model and no other weights; every other path
    as it is. It raises ValueError for several GGUF models and nothing else."""
    if not path.is_dir() or is_converted(path) or Directory(path).has_weights():
        return path
    found = sorted(each for each in path.iterdir() if is_gguf(each) and is_first_part(each.name))
    if len(found) > 1 and not (path / CONFIG).exists():
        names = ", ".join(each.name for each in found[:3])
        raise ValueError(f"{path}: has {len(found)} GGUF models ({names} ...); give one of them")
    return found[0] if len(found) == 1 else path


def is_gguf(path: Path) -> bool:
    """Returns whether it is a file that is named as GGUF files are."""
    return path.suffix.lower() == GGUF and path.is_file()


def is_first_part(name: str) -> bool:
    """Returns whether a GGUF file of this name is a model, or the first part of a split one."""
    part = PART.fullmatch(name)
    return not PROJECTOR.fullmatch(name) and (part is None or part[2] == "00001")
