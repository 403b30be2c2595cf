"""Frozen configuration: the model's shape (Hugging Face's field names) and how its MoE layers run.

An unknown key raises an error that names the nearest known key; an impossible value raises an error that
states the limit.
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

# a larger number means a damaged file, and lists of that length take memory
Layers = Annotated[int, Meta(ge=1, le=10_000, description="a positive integer")]
TokenId = Annotated[int, Meta(ge=-(2**31), le=SIZE_LIMIT)]  # a negative id is never sampled
DTypeName = Literal["float32", "bfloat16"]
LayerType = Literal["full_attention", "sliding_attention", "chunked_attention"]
AttentionKind = Literal["grouped_query", "latent"]
TransportName = Literal["replicated", "all_to_all", "ragged_all_to_all"]


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Mixture-of-Experts decoder. Field names are Hugging Face's; sizes are element counts.

    architecture: the Hugging Face class name, the key into ``jmoe.models``.

    Layers:
    mlp_only_layers: layers with a dense MLP of ``intermediate_size`` instead of experts.
    layer_types: attention type of each layer, "full_attention", "sliding_attention" or "chunked_attention";
        if empty, all layers are sliding if there is a window.
    sliding_window: a token attends to itself and to the ``sliding_window - 1`` tokens before it.
    attention_chunk_size: a token attends to the tokens of its own chunk, up to itself.
    no_rope_layers: 1 for a layer with rotation, 0 for one without, as in Hugging Face; empty: all rotate.

    Attention:
    attention_bias: biases in all projections.
    qkv_bias: biases in the query, key and value projections only.
    qk_norm: norm of queries and keys; "l2" has no weights, comes after the rotation and applies only in
        layers with rotation.
    attention_multiplier: factor of the scores; None is ``head_dim ** -0.5``.
    clip_qkv: largest magnitude of queries, keys and values.
    attn_scale, floor_scale: in layers without rotation, queries at position p are multiplied by
        ``1 + attn_scale * log(1 + floor((p + 1) / floor_scale))``; an attn_scale of 0 is off.
    latent: multi-head latent attention instead of grouped-query attention.

    Experts:
    shared_expert_intermediate_size: inner size of the MLP that all tokens pass in addition; 0 means no MLP.
    shared_expert_gate: the shared expert's output is weighted by a sigmoid of the token.
    hidden_act: activation of all MLPs.
    quant_method: format in which the checkpoint stores experts; they are computed in ``dtype``.
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
        self.rope.check(self.rotary_dim)
        self._check_layers()

    def _check_layers(self) -> None:
        """Raises ValueError if a field about single layers does not fit the number or kinds of layers."""
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
        """The same model with only its first ``layers`` layers."""
        return dataclasses.replace(
            self,
            num_hidden_layers=layers,
            mlp_only_layers=tuple(i for i in self.mlp_only_layers if i < layers),
            layer_types=self.layer_types[:layers],
            no_rope_layers=self.no_rope_layers[:layers],
        )

    def for_context(self, tokens: int) -> Self:
        """The same model for sequences of at most ``tokens``, by which some rotations are chosen."""
        return dataclasses.replace(self, rope=self.rope.for_context(tokens))

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers that have experts, in order; tables and statistics by layer have only these layers."""
        dense = frozenset(self.mlp_only_layers)
        return tuple(i for i in range(self.num_hidden_layers) if i not in dense)

    @property
    def longest_context(self) -> int:
        """The longest context in tokens. If YaRN was added to ``config.json`` as a model card describes,
        ``max_position_embeddings`` is still the trained length, so the YaRN factor counts."""
        rope, trained = self.rope, self.max_position_embeddings
        if rope.rope_type != "yarn" or not rope.factor or not rope.original_max_position_embeddings:
            return trained
        return max(trained, int(rope.factor * rope.original_max_position_embeddings))

    def attention_kind(self, layer: int) -> AttentionKind:
        """The layer's kind of attention, one of ``jmoe.nn.kinds``."""
        return "grouped_query" if self.latent is None else "latent"

    @property
    def rotary_dim(self) -> int:
        """The number of dimensions of a head's query that may rotate."""
        return self.head_dim if self.latent is None else self.latent.qk_rope_head_dim

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
        """Makes the config from the tables of a TOML file; a ValueError names an unknown key."""
        return from_table(cls, values, "model config", "")

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Makes the config from a TOML file; a ValueError names the file."""
        values = read_toml(path)
        with named(path):
            return cls.from_dict(values)


TRAINING = {"mode": "training"}  # marks a field that no engine accepts


@dataclass(frozen=True)
class MoEConfig:
    """How the MoE layers run. The default is lossless: the result equals plain top-k bit for bit.

    attention: split of attention: each rank has its own sequences ("dp"), or the experts' ranks share heads
        ("tp", see ``jmoe.mesh.Split``). It is a separate flag, not a key of the config file.
    transport: how tokens reach their experts' ranks (see ``jmoe.moe.transport``).
    kernel: the grouped-expert implementation; None chooses one, which ``jmoe doctor`` reports.
    binning: decode batches use fewer experts, lossy; None is off.
    capacity: a limit on an expert's load, lossy; None is off. It applies to the result of binning.
    shuffle: experts are renumbered by a placement, and tokens or requests go where their experts are;
        lossless; None is off.
    offload: experts are in host memory, some also on the device; lossless; None is off.
    train_capacity_factor: for training only, with kernel "batched": rows of an expert's buffer as a multiple
        of its even share.
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
        """The lossy techniques that are on, in the order in which they act; if empty, nothing is lossy."""
        return tuple(table for table in (self.binning, self.capacity) if table is not None)

    def check_serves(self) -> None:
        """Raises ValueError for a setting that has a meaning only in training."""
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if each.metadata.get("mode") == TRAINING["mode"] and value != each.default:
                raise ValueError(
                    f"moe.{each.name} = {value!r} is for training only, no engine takes it; a limit on what "
                    "experts compute is moe.capacity"
                )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Makes the config from the JSON form or the TOML form, which has one more level, ``moe``."""
        if isinstance(values, Mapping) and set(values) == {"moe"}:
            values = values["moe"]
        return from_table(cls, values, "moe config", "moe.", without=("attention",))

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Makes the config from a JSON object or the name of a ``.toml`` file."""
        if text.lstrip().startswith("{"):
            try:
                values = unique_json(text)
            except ValueError as error:
                raise ValueError(f"moe config is not valid JSON: {error}") from None
            return cls.from_dict(values)
        values = read_toml(Path(text))
        with named(text):
            return cls.from_dict(values)
