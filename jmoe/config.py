"""Frozen configuration: the model's shape (Hugging Face's field names) and how its MoE layers run.

Unknown keys raise and name the nearest known one; impossible values raise with the limit.
"""

import dataclasses
import difflib
import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

from jmoe_kernels.grouped_mlp import Implementation

DTypeName = Literal["float32", "bfloat16"]
TransportName = Literal["replicated", "all_to_all", "ragged_all_to_all"]


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Mixture-of-Experts decoder. Field names are Hugging Face's; sizes are element counts.

    architecture: the Hugging Face class name, the key into ``jmoe.models``.
    sliding_window: a token attends to itself and ``sliding_window - 1`` tokens before it; None = all.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    max_position_embeddings: int
    norm_topk_prob: bool = True
    qk_norm: Literal["none", "head", "full"] = "none"
    attention_bias: bool = False
    sliding_window: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    dtype: DTypeName = "bfloat16"
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise ValueError(f"{field.name} must be a positive integer, got {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} exceeds num_experts {self.num_experts}"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window must be at least 1, got {self.sliding_window}")
        if not self.rms_norm_eps > 0 or not self.rope_theta > 0:
            raise ValueError(
                f"rms_norm_eps and rope_theta must be above 0, got {self.rms_norm_eps} and {self.rope_theta}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")


@dataclass(frozen=True)
class CapacityConfig:
    """``[moe.capacity]``: how many assignments an expert may take in one step (see ``jmoe.moe.capacity``).

    factor: the limit as a multiple of the even share, gamma. policy: what becomes of the assignments over
    it. metric: which of them stay. scope: whether an expert or a device has the limit. phase: the steps
    it holds in. rounds: attempts of "reroute". renormalize: survivors take over the weight of the dropped.
    """

    factor: float = 1.5
    policy: Literal["drop", "reroute", "expand", "expert_drop"] = "drop"
    metric: Literal["score", "order", "reverse_order", "random"] = "score"
    scope: Literal["expert", "device"] = "expert"
    phase: Literal["prefill", "decode", "both"] = "prefill"
    rounds: int = 3
    renormalize: bool = False

    def __post_init__(self) -> None:
        number = type(self.factor) in (int, float) and math.isfinite(self.factor)
        if not number or self.factor <= 0:
            raise ValueError(f"moe.capacity.factor must be a finite number above 0, got {self.factor!r}")
        if type(self.rounds) is not int or not 1 <= self.rounds <= 16:
            raise ValueError(f"moe.capacity.rounds must be an integer from 1 to 16, got {self.rounds!r}")
        if type(self.renormalize) is not bool:
            raise ValueError(f"moe.capacity.renormalize must be true or false, got {self.renormalize!r}")
        for field in dataclasses.fields(self):
            if choices := get_args(field.type):
                _check_choice(f"moe.capacity.{field.name}", getattr(self, field.name), choices)
        for name, policies in _READ_BY.items():
            value, default = getattr(self, name), getattr(type(self), name)
            if value != default and self.policy not in policies:
                raise ValueError(
                    f"moe.capacity.{name} = {value!r} has no effect with policy {self.policy!r}; "
                    f"it needs one of {', '.join(policies)}"
                )


_RANKED = ("drop", "reroute", "expand")
_READ_BY = {"factor": _RANKED, "metric": _RANKED, "scope": _RANKED, "rounds": ("reroute",)}


@dataclass(frozen=True)
class MoEConfig:
    """How the MoE layers run. The default is lossless: bit for bit what plain top-k gives.

    attention: how tokens come to the layers, of sequences of a rank's own ("dp") or of heads shared over
    the experts' ranks ("tp", see ``jmoe.mesh.Split``); a flag of its own, not a key of the config file.
    transport: how tokens reach their experts' ranks (see ``jmoe.moe.transport``).
    kernel: the grouped-expert implementation; None picks and ``jmoe doctor`` reports the pick.
    capacity: the limit on an expert's load, lossy; None is off.
    train_capacity_factor: for training only, with kernel "batched": rows of an expert's buffer as a
    multiple of its even share.
    """

    attention: Literal["dp", "tp"] = "dp"
    transport: TransportName = "replicated"
    kernel: Implementation | None = None
    train_capacity_factor: float | None = None
    capacity: CapacityConfig | None = None

    def __post_init__(self) -> None:
        _check_choice("attention", self.attention, ("dp", "tp"))
        _check_choice("moe.transport", self.transport, get_args(TransportName))
        _check_choice("moe.kernel", self.kernel, (None, *get_args(Implementation)))
        if self.train_capacity_factor is not None and self.kernel != "batched":
            raise ValueError("moe.train_capacity_factor needs moe.kernel = 'batched'")
        if not isinstance(self.capacity, CapacityConfig | None):
            raise ValueError(f"moe.capacity must be a CapacityConfig or None, got {self.capacity!r}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From the JSON form or, with one level ``moe`` around it, the TOML form."""
        if set(values) == {"moe"}:
            values = values["moe"]
        values = _fields_of(cls, "moe config", values)
        if values.get("capacity") is not None:
            table = _fields_of(CapacityConfig, "moe.capacity", values["capacity"])
            values["capacity"] = CapacityConfig(**table)
        return cls(**values)

    @classmethod
    def from_text(cls, text: str) -> Self:
        """From a JSON object or the name of a ``.toml`` file."""
        if text.lstrip().startswith("{"):
            try:
                return cls.from_dict(json.loads(text))
            except json.JSONDecodeError as error:
                raise ValueError(f"moe config is not valid JSON: {error}") from None
        return cls.from_dict(read_toml(Path(text)))


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; ValueError naming the file where it is absent or malformed."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None


def check_keys(what: str, values: Iterable[str], known: Iterable[str]) -> None:
    """Raises ValueError naming the first unknown key and the nearest known one."""
    known = list(known)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise ValueError(f"{what}: unknown key {key!r}; nearest known key: {near[0]!r}")


def _fields_of(cls: type, what: str, values: Any) -> dict[str, Any]:
    """The table as keyword arguments of the dataclass ``cls``."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{what} must be a table of keys, got {type(values).__name__}")
    check_keys(what, values, [f.name for f in dataclasses.fields(cls) if f.name != "attention"])
    return dict(values)


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")
