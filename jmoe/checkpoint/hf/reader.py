"""The tensors of a Hugging Face directory: found in its safetensors files, and checked."""

from collections.abc import Iterator
from pathlib import Path

from jmoe.checkpoint.checkpoint import Checkpoint
from jmoe.checkpoint.safetensors_file import HEADER_LIMIT, TensorInfo, open_regular, read_header, read_json
from jmoe.config.model import ModelConfig
from jmoe.config.units import brief
from jmoe.models import get_family
from jmoe.models.weights import StoredTensor

INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class HFCheckpoint(Checkpoint):
    """The safetensors of a Hugging Face directory."""

    @property
    def sizes_source(self) -> str:
        return "config.json"

    def _open(self) -> dict[str, TensorInfo]:
        weight_map = self._weight_map()
        tensors: dict[str, TensorInfo] = {}
        for name in _shards(self.directory) if weight_map is None else sorted(set(weight_map.values())):
            path = self.directory / name
            self._files[path] = open_regular(path)
            for tensor, info in read_header(self._files[path]).items():
                if tensor in tensors:
                    raise ValueError(f"{path}: tensor {brief(tensor)} is also in {tensors[tensor].file.name}")
                if weight_map is not None and weight_map.get(tensor) != name:
                    raise ValueError(f"{path}: tensor {brief(tensor)} is not given to this file by {INDEX}")
                tensors[tensor] = info
        for tensor, file in (weight_map or {}).items():
            if tensor not in tensors:
                path = self.directory / file
                raise ValueError(f"{path}: has no tensor {brief(tensor)}, see {INDEX}")
        return tensors

    def _weight_map(self) -> dict[str, str] | None:
        path = self.directory / INDEX
        if not path.exists():
            return None
        if (self.directory / "model.safetensors").exists():
            raise ValueError(f"{self.directory}: has both model.safetensors and {INDEX}; remove one")
        weight_map = read_json(path, HEADER_LIMIT).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{path}: has no weight_map")
        for tensor, name in weight_map.items():
            if not isinstance(name, str) or not _is_plain_name(name):
                raise ValueError(
                    f"{path}: tensor {brief(tensor)} lies in {brief(name)}, not a plain *.safetensors name"
                )
        return weight_map

    def names(self, cfg: ModelConfig) -> Iterator[StoredTensor]:
        yield from get_family(cfg.architecture).names(cfg)

    def is_ignored(self, cfg: ModelConfig, name: str) -> bool:
        """Returns whether it is one of the rotary frequencies that old releases stored, which every reader
        computes from ``config.json``, or whether the family ignores that tensor and the checkpoint has the
        tensor that shows that it may."""
        family = get_family(cfg.architecture)
        witness = family.witness(name)
        has_witness = witness is None or witness in self.tensors
        return name.endswith(".rotary_emb.inv_freq") or (family.is_ignored(cfg, name) and has_witness)


def _is_plain_name(name: str) -> bool:
    return name.endswith(".safetensors") and not set(name) & set("/\\\0") and not name.startswith(".")


def _shards(directory: Path) -> list[str]:
    """Returns the one safetensors file of a directory without an index."""
    try:
        names = sorted(p.name for p in directory.iterdir())
    except OSError as error:
        raise ValueError(f"{directory}: cannot be listed: {error.strerror}") from None
    found = [n for n in names if n.endswith(".safetensors")]
    if "model.safetensors" in found or len(found) == 1:
        return ["model.safetensors" if "model.safetensors" in found else found[0]]
    if found:
        what = f"has {len(found)} .safetensors files but no {INDEX}"
        raise ValueError(f"{directory}: {what} (incomplete download?)")
    pickles = [n for n in names if n.endswith(_PICKLES)]
    if pickles:
        raise ValueError(
            f"{directory}: has only {pickles[0]}: pickled weights can run code and are never opened; "
            "only .safetensors are read"
        )
    raise ValueError(f"{directory}: has no .safetensors file")
