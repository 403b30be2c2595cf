"""The format of each weight of a checkpoint: by its configuration, checked against its tensors."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jmoe.checkpoint.quantised.formats import Format
from jmoe.checkpoint.quantised.methods import METHODS, Rule
from jmoe.checkpoint.quantised.methods.patterns import Whole, runs
from jmoe.checkpoint.safetensors_file import TensorInfo, read_json
from jmoe.config.reading import named, shown
from jmoe.config.units import brief

WEIGHT = ".weight"
CODES = ("F8_E4M3", "U8", "I8", "I32")  # dtypes that only quantised tensors have
# scales of activations and of the KV cache: products run in the model's dtype, and the cache has its own
UNREAD = re.compile(r"\.(input_(global_)?scale|input_zero_point|[kqv]_scale|[kqv]_proj\.output_scale)$")


@dataclass(frozen=True)
class Quantisation:
    """The rules of a checkpoint's configuration about the formats of its weights.

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
        first = min((self._by_name[run] for run in runs(module) if run in self._by_name), default=None)
        for number, rule in self._others:
            if first is not None and first < number:
                break
            if rule.matches(module):
                return rule
        return None if first is None else self.rules[first]

    @cached_property
    def _by_name(self) -> dict[str, int]:
        """The numbers of the rules that are names: lists have up to tens of thousands of them."""
        wholes = [(i, rule.matches) for i, rule in enumerate(self.rules) if isinstance(rule.matches, Whole)]
        return {whole.name: i for i, whole in reversed(wholes)}

    @cached_property
    def _others(self) -> list[tuple[int, Rule]]:
        return [(i, rule) for i, rule in enumerate(self.rules) if not isinstance(rule.matches, Whole)]

    def format_of(
        self, name: str, tensors: Mapping[str, TensorInfo], *, is_product: bool = False
    ) -> Format | None:
        """Returns the format of a weight, or None if it is plain.

        It raises ValueError, with both, if the rules and the tensors contradict each other.

        is_product: whether it is a matrix of attention, of an expert or of an MLP, which is never plain if
            the rules quantise it.
        """
        rule = self.rule_of(name)
        plain, stored = tensors.get(name), None if rule is None else rule.format
        if stored is not None and _is_stored(stored, name, tensors):
            for other in stored.tensor_names(name):
                if other not in tensors:
                    file = tensors[stored.tensor_names(name)[0]].file
                    raise ValueError(f"{file}: tensor {brief(other)} is missing: {self._said(name, rule)}")
            return stored.of_tensors(name, tensors)
        codes = _codes_of(name, tensors)
        if codes is not None or (plain is not None and is_product and stored is not None):
            info = tensors[codes or name]
            raise ValueError(
                f"{info.file}: tensor {brief(codes or name)} has dtype {info.dtype}, but "
                f"{self._said(name, rule)}"
            )
        if plain is None and self.rules:
            raise ValueError(f"{next(iter(tensors.values())).file.parent}: tensor {brief(name)} is missing")
        return None

    def _said(self, name: str, rule: Rule | None) -> str:
        """Returns what the rule about a weight says, for a message."""
        said = "no rule is about it"
        if rule is not None and rule.format is None:
            said = f"{rule.text} leaves it plain"
        elif rule is not None and rule.format is not None:
            names = " and ".join(map(brief, rule.format.tensor_names(name)))
            said = f"{rule.text} needs {names} ({rule.format.name})"
        return f"by {self.source}: {said}"

    def is_unread(self, name: str) -> bool:
        """Returns whether a tensor may be there without being read: it is not about the weights."""
        return bool(self.rules) and UNREAD.search(name) is not None


def _is_stored(stored: Format, name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    codes, *_ = stored.tensor_names(name)
    return codes in tensors and (codes != name or tensors[codes].dtype in CODES)


def _codes_of(name: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    """Returns the tensor that has the codes of a weight, in any format; None if it is plain or missing."""
    if name in tensors:
        return name if tensors[name].dtype in CODES else None
    module = name.removesuffix(WEIGHT) + "."
    return min((t for t in tensors if t.startswith(module) and tensors[t].dtype in CODES), default=None)


def read_quantisation(directory: Path) -> Quantisation:
    """Returns what the directory's files say; raises ValueError, naming the file and the key, for what is not
    read, and naming both files if two contradict each other."""
    path = directory / "config.json"
    config = read_json(path).get("quantization_config") if path.is_file() else None
    for twin in filter(None, (method.twin for method in METHODS.values())):
        file = directory / twin.file
        if not file.is_file():
            continue
        with named(f"{file}: {twin.key}"):
            own = twin.rewritten(_object(read_json(file).get(twin.key)))
        if not config:
            return parsed(own, file, twin.key)
        with named(f"{path}: quantization_config"):
            stated = _object(config)
            if stated.get("quant_method") != own["quant_method"]:
                method = shown(stated.get("quant_method"))
                raise ValueError(f"quant_method is {method}, but {file} is of {own['quant_method']!r}")
            twin.check(stated, own)
    return parsed(config, path) if config else Quantisation()


def parsed(config: Any, path: Path, key: str = "quantization_config") -> Quantisation:
    """Returns a ``quantization_config``, or what a file has in its place, as rules."""
    with named(f"{path}: {key}"):
        config = {"quant_method": config} if isinstance(config, str) else _object(config)
        name = config.get("quant_method")
        if not isinstance(name, str) or name not in METHODS:
            read = ", ".join(map(repr, METHODS))
            raise ValueError(f"method {shown(name)} is not read; {read} are")
        return Quantisation(f"{path.name}'s {key}", tuple(METHODS[name].rules(config)))


def _object(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"it must be an object, it is {shown(value)}")
    return value
