"""Which format each weight of a checkpoint has: by its configuration, checked against its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jmoe.checkpoint.formats import Format
from jmoe.checkpoint.methods import METHODS, Rule
from jmoe.checkpoint.safetensors_file import TensorInfo, read_json
from jmoe.config.reading import named, shown
from jmoe.config.units import brief

WEIGHT = ".weight"
CODES = ("F8_E4M3", "U8", "I8", "I32")  # dtypes that only quantised tensors have


@dataclass(frozen=True)
class Quantisation:
    """What a checkpoint's configuration says about the formats of its weights.

    source: where it says so, for messages.
    rules: its rules; the first that matches a module decides.
    """

    source: str = "config.json, which has no quantization_config"
    rules: tuple[Rule, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether no weight is quantised."""
        return not self.rules

    def rule_of(self, name: str) -> Rule | None:
        """Returns the rule about the weight of that name, or None if there is none."""
        module = name.removesuffix(WEIGHT)
        return next((rule for rule in self.rules if rule.matches(module)), None)

    def format_of(self, name: str, tensors: Mapping[str, TensorInfo]) -> Format | None:
        """Returns the format of a weight, or None if it is plain.

        It raises ValueError, with both, if the rules and the tensors contradict each other.
        """
        rule = self.rule_of(name)
        plain, stored = tensors.get(name), None if rule is None else rule.format
        if stored is not None and _is_stored(stored, name, tensors):
            return stored
        if plain is not None and plain.dtype in CODES:
            said = f"{rule.text} leaves it plain" if rule else "no rule is about it"
            if rule is not None and stored is not None:
                said = f"{rule.text} needs {' and '.join(map(brief, stored.tensor_names(name)))}"
            raise ValueError(
                f"{plain.file}: tensor {brief(name)} has dtype {plain.dtype}, but by {self.source} {said}"
            )
        return None


def _is_stored(stored: Format, name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    codes, *_ = stored.tensor_names(name)
    return codes in tensors and (codes != name or tensors[codes].dtype in CODES)


def read_quantisation(directory: Path) -> Quantisation:
    """Returns what the directory's files say; raises ValueError, naming the file and the key, for what is not
    read."""
    path = directory / "config.json"
    config = read_json(path).get("quantization_config") if path.is_file() else None
    return Quantisation() if not config else parsed(config, path)


def parsed(config: Any, path: Path) -> Quantisation:
    """Returns a ``quantization_config`` as rules."""
    with named(f"{path}: quantization_config"):
        if not isinstance(config, Mapping):
            raise ValueError(f"it must be an object, it is {shown(config)}")
        method = config.get("quant_method")
        if method not in METHODS:
            read = ", ".join(map(repr, METHODS))
            raise ValueError(f"method {shown(method)} is not read; {read} are")
        return Quantisation(f"{path.name}'s quantization_config", tuple(METHODS[method].rules(config)))
