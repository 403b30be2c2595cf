"""Frozen configuration: the model's shape (Hugging Face's field names) and how its MoE layers run.

Unknown keys raise and name the nearest known one; impossible values raise with the limit.
"""

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

from jmoe_kernels.grouped_mlp import Implementation

from jmoe.techniques import BinningConfig, CapacityConfig, OffloadConfig, ShuffleConfig, check_choice

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
class MoEConfig:
    """How the MoE layers run. The default is lossless: bit for bit what plain top-k gives.

    attention: how tokens come to the layers, of sequences of a rank's own ("dp") or of heads shared over
    the experts' ranks ("tp", see ``jmoe.mesh.Split``); a flag of its own, not a key of the config file.
    transport: how tokens reach their experts' ranks (see ``jmoe.moe.transport``).
    kernel: the grouped-expert implementation; None picks and ``jmoe doctor`` reports the pick.
    binning: decode batches on fewer experts, lossy; None is off.
    capacity: the limit on an expert's load, lossy; None is off. It limits what binning has left.
    shuffle: experts renumbered by a placement, and tokens or requests where their experts are; lossless.
    offload: experts in host memory, some on the device; lossless.
    train_capacity_factor: for training only, with kernel "batched": rows of an expert's buffer as a
    multiple of its even share.
    """

    attention: Literal["dp", "tp"] = "dp"
    transport: TransportName = "replicated"
    kernel: Implementation | None = None
    train_capacity_factor: float | None = None
    binning: BinningConfig | None = None
    capacity: CapacityConfig | None = None
    shuffle: ShuffleConfig | None = None
    offload: OffloadConfig | None = None

    def __post_init__(self) -> None:
        check_choice("attention", self.attention, ("dp", "tp"))
        check_choice("moe.transport", self.transport, get_args(TransportName))
        check_choice("moe.kernel", self.kernel, (None, *get_args(Implementation)))
        if self.train_capacity_factor is not None and self.kernel != "batched":
            raise ValueError("moe.train_capacity_factor needs moe.kernel = 'batched'")
        for name, table in TABLES.items():
            value = getattr(self, name)
            if not isinstance(value, table | None):
                raise ValueError(f"moe.{name} must be a {table.__name__} or None, got {value!r}")
        if self.binning is not None and self.binning.resident_bonus and self.offload is None:
            raise ValueError("moe.binning.resident_bonus needs moe.offload: all experts are on the device")
        if self.offload is not None and self.train_capacity_factor is not None:
            raise ValueError("moe.offload and moe.train_capacity_factor exclude each other")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From the JSON form or, with one level ``moe`` around it, the TOML form."""
        if set(values) == {"moe"}:
            values = values["moe"]
        values = _fields_of(cls, "moe config", values)
        for name, table in TABLES.items():
            if values.get(name) is not None:
                values[name] = table(**_fields_of(table, f"moe.{name}", values[name]))
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


TABLES = {
    "binning": BinningConfig,
    "capacity": CapacityConfig,
    "shuffle": ShuffleConfig,
    "offload": OffloadConfig,
}


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
