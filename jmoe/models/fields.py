"""The values of a ``config.json``. Each is converted to the type declared here when a family reads it.

Fields that no family reads may have any value. ``None`` is null: each family says what null means for the
fields that may have it.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Self

from msgspec import Meta

from jmoe.config.model import Layers, LayerType, TokenId
from jmoe.config.parts import SIZE_LIMIT, Count, NotNegative
from jmoe.config.reading import Natural, Positive, typed

_NAMES: tuple[tuple[Any, str], ...] = (
    (
        Count,
        "vocab_size hidden_size num_attention_heads num_key_value_heads head_dim "
        "num_experts num_local_experts n_routed_experts num_experts_per_tok moe_intermediate_size "
        "intermediate_size intermediate_size_mlp max_position_embeddings sliding_window "
        "attention_chunk_size original_max_position_embeddings n_group topk_group kv_lora_rank "
        "q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim no_rope_layer_interval "
        "interleave_moe_layer_step floor_scale",
    ),
    (
        Annotated[int, Meta(ge=0, le=SIZE_LIMIT)],
        "shared_expert_intermediate_size n_shared_experts first_k_dense_replace max_window_layers "
        "decoder_sparse_step",
    ),
    (
        Positive,
        "rms_norm_eps rope_theta partial_rotary_factor routed_scaling_factor clip_qkv "
        "embedding_multiplier attention_multiplier residual_multiplier logits_scaling",
    ),
    (NotNegative, "router_jitter_noise attn_scale swiglu_limit swiglu_alpha"),
    (
        bool,
        "tie_word_embeddings norm_topk_prob attention_bias qkv_bias lm_head_bias use_qk_norm "
        "use_sliding_window rope_interleave",
    ),
    (str, "dtype torch_dtype hidden_act topk_method scoring_func"),
    (Layers, "num_hidden_layers"),
    (TokenId, "bos_token_id"),
    (TokenId | tuple[TokenId, ...], "eos_token_id"),
    (bool | int, "attn_temperature_tuning"),
    (int | tuple[int, ...], "moe_layer_freq"),
    (tuple[Natural, ...], "mlp_only_layers moe_layers no_rope_layers"),
    (tuple[LayerType, ...], "layer_types"),
    (tuple[str, ...], "architectures"),
    (dict[str, Any] | str, "quantization_config"),
    (dict[str, Any], "text_config rope_parameters rope_scaling"),
)
FIELDS: dict[str, Any] = {name: kind for kind, names in _NAMES for name in names.split()}


class HFConfig(Mapping[str, Any]):
    """A ``config.json``, or a table in it.

    prefix: prefix of the fields' names in messages.

    Reading a field raises ValueError if its value is not of the declared type, and KeyError if the file has
    no such field.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = ""):
        self._values, self._prefix = values, prefix

    def __getitem__(self, name: str) -> Any:
        kind, value = FIELDS[name], self._values[name]
        return None if value is None else typed(self._prefix + name, value, kind)

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._values if name in FIELDS)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def with_defaults(self, defaults: Mapping[str, Any]) -> Self:
        """Returns a copy with ``defaults`` for fields that the file does not have."""
        return type(self)({**defaults, **self._values}, self._prefix)

    def with_values(self, values: Mapping[str, Any]) -> Self:
        """Returns a copy in which ``values`` replace those of the file."""
        return type(self)({**self._values, **values}, self._prefix)

    def table(self, name: str) -> Self:
        """Returns the fields of a table."""
        return type(self)(self[name], f"{self._prefix}{name}.")
