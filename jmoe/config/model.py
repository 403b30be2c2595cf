"""Frozen configuration of a model's shape, in Hugging Face's field names.

An unknown key raises an error that names the nearest known key; an impossible value raises an error that
states the limit.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from jmoe_kernels.settings import Activation, Span
from msgspec import Meta

from jmoe.config.choices import KVCacheName
from jmoe.config.parts import SIZE_LIMIT, Count, LatentConfig, NotNegative, RopeConfig, RouterConfig
from jmoe.config.reading import (
    Natural,
    Positive,
    check_fields,
    from_table,
    named,
    read_toml,
    shown,
)

# a larger number means a damaged file, and lists of that length take memory
Layers = Annotated[int, Meta(ge=1, le=10_000, description="a positive integer")]
TokenId = Annotated[int, Meta(ge=-(2**31), le=SIZE_LIMIT)]  # a negative id is never sampled
DTypeName = Literal["float32", "bfloat16"]
LayerType = Literal["full_attention", "sliding_attention", "chunked_attention"]
AttentionKind = Literal["grouped_query", "latent"]


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Mixture-of-Experts decoder. Field names are Hugging Face's; sizes are element counts.

    architecture: Hugging Face class name, the key into ``jmoe.models``.

    Layers:
    mlp_only_layers: layers with a dense MLP of ``intermediate_size`` instead of experts.
    layer_types: attention type of each layer, "full_attention", "sliding_attention" or "chunked_attention";
        if empty, all layers are sliding if there is a window.
    sliding_window: number of tokens that a token attends to: itself and the ``sliding_window - 1`` tokens
        before it.
    attention_chunk_size: number of tokens of a chunk; a token attends to the tokens of its own chunk, up to
        itself.
    no_rope_layers: 1 for a layer with rotation, 0 for one without, as in Hugging Face; if empty, all rotate.

    Attention:
    attention_bias: whether all projections have biases.
    qkv_bias: whether only the query, key and value projections have biases.
    qk_norm: norm of queries and keys; "l2" has no weights, comes after the rotation and applies only in
        layers with rotation.
    attention_multiplier: factor of the scores; None is ``head_dim ** -0.5``.
    clip_qkv: largest magnitude of queries, keys and values.
    attn_scale, floor_scale: numbers of the scaling in layers without rotation: queries at position p are
        multiplied by ``1 + attn_scale * log(1 + floor((p + 1) / floor_scale))``; an attn_scale of 0 is off.
    latent: multi-head latent attention instead of grouped-query attention.

    Experts:
    shared_expert_intermediate_size: inner size of the MLP that all tokens pass in addition; 0 means no MLP.
    shared_expert_gate: whether the shared expert's output is weighted by a sigmoid of the token.
    hidden_act: activation of all MLPs.
    quant_method: format in which the checkpoint stores experts; they are computed in ``dtype``.
    kv_cache_dtype: how keys and values are cached, "auto" in ``dtype``. No checkpoint says it.
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
    kv_cache_dtype: KVCacheName = "auto"
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
        self._check_layers()

    def _check_layers(self) -> None:
        """Raises ValueError if a field about single layers does not fit the number or kinds of layers."""
        for name in ("layer_types", "no_rope_layers"):
            count = len(getattr(self, name))
            if count not in (0, self.num_hidden_layers):
                raise ValueError(f"{name} must have {self.num_hidden_layers} entries, got {count}")
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
        """Returns the same model with only its first ``layers`` layers."""
        return self.only(range(layers))

    def only(self, layers: Sequence[int]) -> Self:
        """Returns the same model with only these layers."""
        return dataclasses.replace(
            self,
            num_hidden_layers=len(layers),
            mlp_only_layers=tuple(new for new, old in enumerate(layers) if old in self.mlp_only_layers),
            layer_types=tuple(self.layer_types[i] for i in layers) if self.layer_types else (),
            no_rope_layers=tuple(self.no_rope_layers[i] for i in layers) if self.no_rope_layers else (),
        )

    def for_context(self, tokens: int) -> Self:
        """Returns the same model for sequences of at most ``tokens``, by which some rotations are chosen."""
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
        """Returns the layer's kind of attention, one of ``jmoe.nn.kinds``."""
        return "grouped_query" if self.latent is None else "latent"

    def span(self, layer: int) -> Span:
        """Returns what a query of the layer attends to."""
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
