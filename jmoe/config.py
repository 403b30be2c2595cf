"""Frozen configuration: the model's shape (Hugging Face's field names) and how its MoE layers run.

Unknown keys raise and name the nearest known one; impossible values raise with the limit.
"""

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

from jmoe_kernels.grouped_mlp import Activation, Implementation
from jmoe_kernels.paged_attention import Span

from jmoe.anatomy import LatentConfig, RopeConfig, RouterConfig
from jmoe.techniques import BinningConfig, CapacityConfig, OffloadConfig, ShuffleConfig, check_choice

DTypeName = Literal["float32", "bfloat16"]
LayerType = Literal["full_attention", "sliding_attention", "chunked_attention"]
TransportName = Literal["replicated", "all_to_all", "ragged_all_to_all"]


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Mixture-of-Experts decoder. Field names are Hugging Face's; sizes are element counts.

    architecture: the Hugging Face class name, the key into ``jmoe.models``.

    Layers: mlp_only_layers have a dense MLP of ``intermediate_size`` instead of experts. layer_types: of each
    layer's attention, "full_attention", "sliding_attention" or "chunked_attention"; empty is sliding where
    there is a window. sliding_window: a token attends to itself and ``sliding_window - 1`` tokens before it;
    attention_chunk_size: to those of its own chunk. no_rope_layers: 1 where a layer rotates, 0 where not, as
    Hugging Face spells it; empty is all.
    Attention: attention_bias is of all projections, qkv_bias of those in. qk_norm "l2" has no weights,
    follows the rotation and stands in rotated layers only. attention_multiplier: of the scores; None is
    ``head_dim ** -0.5``. clip_qkv: the largest magnitude. attn_scale, floor_scale: in layers without
    rotation, queries at position p times ``1 + attn_scale * log(1 + floor((p + 1) / floor_scale))``; 0 is
    off. latent: multi-head latent attention instead of grouped-query attention.
    Experts: shared_expert_intermediate_size is of the MLP that all tokens pass beside them, 0 without;
    shared_expert_gate: a sigmoid of the token weighs it. hidden_act: of all MLPs. quant_method: in which the
    checkpoint keeps experts; they are computed with in ``dtype``.
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
    router: RouterConfig = field(default_factory=RouterConfig)
    rope: RopeConfig = field(default_factory=RopeConfig)
    latent: LatentConfig | None = None
    mlp_only_layers: tuple[int, ...] = ()
    intermediate_size: int | None = None
    layer_types: tuple[str, ...] = ()
    sliding_window: int | None = None
    attention_chunk_size: int | None = None
    no_rope_layers: tuple[int, ...] = ()
    qk_norm: Literal["none", "head", "full", "l2"] = "none"
    attention_bias: bool = False
    qkv_bias: bool = False
    attention_sinks: bool = False
    attention_multiplier: float | None = None
    clip_qkv: float | None = None
    attn_scale: float = 0.0
    floor_scale: int = 8192
    hidden_act: Activation = "silu"
    expert_bias: bool = False
    shared_expert_intermediate_size: int = 0
    shared_expert_gate: bool = False
    norm: Literal["rms", "layer"] = "rms"
    rms_norm_eps: float = 1e-6
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    lm_head_bias: bool = False
    tie_word_embeddings: bool = False
    dtype: DTypeName = "bfloat16"
    quant_method: Literal["mxfp4"] | None = None
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value, least = getattr(self, each.name), 0 if each.default == 0 else 1
            if each.type is int and (type(value) is not int or value < least):
                kind = "a positive integer" if least else "an integer of at least 0"
                raise ValueError(f"{each.name} must be {kind}, got {value!r}")
            if (choices := get_args(each.type)) and isinstance(choices[0], str):
                check_choice(each.name, value, choices)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} exceeds num_experts {self.num_experts}"
            )
        if not self.rms_norm_eps > 0:
            raise ValueError(f"rms_norm_eps must be above 0, got {self.rms_norm_eps}")
        self.router.check(self.num_experts, self.num_experts_per_tok)
        self.rope.check(self.head_dim if self.latent is None else self.latent.qk_rope_head_dim)
        if self.latent is not None:
            self.latent.check()
        self._check_layers()

    def _check_layers(self) -> None:
        """Raises ValueError where what stands for single layers does not fit them all."""
        for name in ("layer_types", "no_rope_layers"):
            given = len(getattr(self, name))
            if given not in (0, self.num_hidden_layers):
                raise ValueError(f"{name} must have {self.num_hidden_layers} entries, got {given}")
        for name, kind in (
            ("sliding_window", "sliding_attention"),
            ("attention_chunk_size", "chunked_attention"),
        ):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be at least 1, got {value}")
            if value is None and kind in self.layer_types:
                raise ValueError(f"layer_types has {kind!r} and there is no {name}")
        for kind in self.layer_types:
            check_choice("layer_types", kind, get_args(LayerType))
        if any(not 0 <= i < self.num_hidden_layers for i in self.mlp_only_layers):
            raise ValueError(
                f"mlp_only_layers must be from 0 to {self.num_hidden_layers - 1}, got {self.mlp_only_layers}"
            )
        if not self.moe_layers:
            raise ValueError("every layer is dense: there are no experts to serve")
        if self.mlp_only_layers and not self.intermediate_size:
            raise ValueError("dense layers need intermediate_size")

    def first(self, layers: int) -> Self:
        """The same model with its first ``layers`` alone."""
        return dataclasses.replace(
            self,
            num_hidden_layers=layers,
            mlp_only_layers=tuple(i for i in self.mlp_only_layers if i < layers),
            layer_types=self.layer_types[:layers],
            no_rope_layers=self.no_rope_layers[:layers],
        )

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers that have experts, in order; tables and statistics by layer have these alone."""
        return tuple(i for i in range(self.num_hidden_layers) if i not in self.mlp_only_layers)

    @property
    def longest_context(self) -> int:
        """Tokens. Where a model card has YaRN added to ``config.json``, ``max_position_embeddings`` stays."""
        rope, trained = self.rope, self.max_position_embeddings
        if rope.rope_type != "yarn" or not rope.factor or not rope.original_max_position_embeddings:
            return trained
        return max(trained, int(rope.factor * rope.original_max_position_embeddings))

    @property
    def cached_heads(self) -> int:
        """Rows of the KV cache a token and layer: those of a latent are one."""
        return self.num_key_value_heads if self.latent is None else 1

    @property
    def cached_dim(self) -> int:
        """Numbers of such a row."""
        return self.head_dim if self.latent is None else self.latent.cached_dim

    def span(self, layer: int) -> Span:
        """What a query of the layer attends to."""
        kind = self.layer_types[layer] if self.layer_types else "sliding_attention"
        return Span(
            window=self.sliding_window if kind == "sliding_attention" else None,
            chunk=self.attention_chunk_size if kind == "chunked_attention" else None,
        )

    def rotates(self, layer: int) -> bool:
        return not self.no_rope_layers or bool(self.no_rope_layers[layer])

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From the tables of a TOML file; ValueError names an unknown key."""
        values = _fields_of(cls, "model config", values)
        for name, table in MODEL_TABLES.items():
            if name in values:
                values[name] = table(**_tuples(_fields_of(table, name, values[name])))
        return cls(**_tuples(values))


MODEL_TABLES = {"router": RouterConfig, "rope": RopeConfig, "latent": LatentConfig}


TRAINING = {"mode": "training"}  # of a field that no engine takes


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
    train_capacity_factor: float | None = field(default=None, metadata=TRAINING)
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

    def check_serves(self) -> None:
        """Raises ValueError for a setting that means something in training alone."""
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if each.metadata.get("mode") == TRAINING["mode"] and value != each.default:
                raise ValueError(
                    f"moe.{each.name} = {value!r} is for training only, no engine takes it; a limit on what "
                    "experts compute is moe.capacity"
                )

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


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Lists as tuples: a configuration can be hashed."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
