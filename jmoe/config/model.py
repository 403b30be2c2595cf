"""Frozen configuration: the model's shape (Hugging Face's field names) and how its MoE layers run.

Unknown keys raise and name the nearest known one; impossible values raise with the limit.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from jmoe_kernels.grouped_mlp import Activation, Implementation
from jmoe_kernels.paged_attention import Span
from msgspec import Meta

from jmoe.config.anatomy import SIZE_LIMIT, Count, LatentConfig, NotNegative, RopeConfig, RouterConfig
from jmoe.config.reading import (
    Natural,
    Positive,
    check_fields,
    from_table,
    named,
    read_toml,
    shown,
    unique_json,
)
from jmoe.config.techniques import BinningConfig, CapacityConfig, LossyConfig, OffloadConfig, ShuffleConfig

# more would be a damaged file, and lists of them take memory
Layers = Annotated[int, Meta(ge=1, le=10_000, description="a positive integer")]
TokenId = Annotated[int, Meta(ge=-(2**31), le=SIZE_LIMIT)]  # a negative one is never drawn
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
    vocab_size: Count
    hidden_size: Count
    num_hidden_layers: Layers
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Count
    num_experts: Count
    num_experts_per_tok: Count
    moe_intermediate_size: Count
    max_position_embeddings: Count
    router: RouterConfig = field(default_factory=RouterConfig)
    rope: RopeConfig = field(default_factory=RopeConfig)
    latent: LatentConfig | None = None
    mlp_only_layers: tuple[Natural, ...] = ()
    intermediate_size: Count | None = None
    layer_types: tuple[LayerType, ...] = ()
    sliding_window: Count | None = None
    attention_chunk_size: Count | None = None
    no_rope_layers: tuple[Natural, ...] = ()
    qk_norm: Literal["none", "head", "full", "l2"] = "none"
    attention_bias: bool = False
    qkv_bias: bool = False
    attention_sinks: bool = False
    attention_multiplier: Positive | None = None
    clip_qkv: Positive | None = None
    attn_scale: NotNegative = 0.0
    floor_scale: Count = 8192
    hidden_act: Activation = "silu"
    expert_bias: bool = False
    shared_expert_intermediate_size: Annotated[int, Meta(ge=0, le=SIZE_LIMIT)] = 0
    shared_expert_gate: bool = False
    norm: Literal["rms", "layer"] = "rms"
    rms_norm_eps: Positive = 1e-6
    embedding_multiplier: Positive = 1.0
    residual_multiplier: Positive = 1.0
    logits_scaling: Positive = 1.0
    lm_head_bias: bool = False
    tie_word_embeddings: bool = False
    dtype: DTypeName = "bfloat16"
    quant_method: str | None = None
    eos_token_ids: tuple[TokenId, ...] = ()
    bos_token_id: TokenId | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} exceeds num_experts {self.num_experts}"
            )
        self.router.check(self.num_experts, self.num_experts_per_tok)
        self.rope.check(self.head_dim if self.latent is None else self.latent.qk_rope_head_dim)
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
            if getattr(self, name) is None and kind in self.layer_types:
                raise ValueError(f"layer_types has {kind!r} and there is no {name}")
        if max(self.mlp_only_layers, default=0) >= self.num_hidden_layers:
            last, most = self.num_hidden_layers - 1, max(self.mlp_only_layers)
            raise ValueError(f"mlp_only_layers must be from 0 to {last}, got {shown(most)}")
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
        dense = frozenset(self.mlp_only_layers)
        return tuple(i for i in range(self.num_hidden_layers) if i not in dense)

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
        return from_table(cls, values, "model config", "")

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """From a TOML file; ValueError names it."""
        values = read_toml(path)
        with named(path):
            return cls.from_dict(values)


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
    train_capacity_factor: Positive | None = field(default=None, metadata=TRAINING)
    binning: BinningConfig | None = None
    capacity: CapacityConfig | None = None
    shuffle: ShuffleConfig | None = None
    offload: OffloadConfig | None = None

    def __post_init__(self) -> None:
        check_fields(self, "moe.")
        if self.train_capacity_factor is not None and self.kernel != "batched":
            raise ValueError("moe.train_capacity_factor needs moe.kernel = 'batched'")
        if self.binning is not None and self.binning.resident_bonus and self.offload is None:
            raise ValueError("moe.binning.resident_bonus needs moe.offload: all experts are on the device")
        if self.offload is not None and self.train_capacity_factor is not None:
            raise ValueError("moe.offload and moe.train_capacity_factor exclude each other")

    @property
    def stages(self) -> tuple[LossyConfig, ...]:
        """The lossy techniques that are on, in the order in which they act; without any, nothing is lossy."""
        return tuple(table for table in (self.binning, self.capacity) if table is not None)

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
        if isinstance(values, Mapping) and set(values) == {"moe"}:
            values = values["moe"]
        return from_table(cls, values, "moe config", "moe.", without=("attention",))

    @classmethod
    def from_text(cls, text: str) -> Self:
        """From a JSON object or the name of a ``.toml`` file."""
        if text.lstrip().startswith("{"):
            try:
                values = unique_json(text)
            except ValueError as error:
                raise ValueError(f"moe config is not valid JSON: {error}") from None
            return cls.from_dict(values)
        values = read_toml(Path(text))
        with named(text):
            return cls.from_dict(values)
