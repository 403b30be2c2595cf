"""The declaration of a model family: it maps Hugging Face's config and weight names to the decoder."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from jmoe.config.model import ModelConfig
from jmoe.config.parts import RopeConfig, RopeType, RouterConfig
from jmoe.config.reading import hints, shown, typed
from jmoe.models.fields import HFConfig
from jmoe.models.weights import StoredTensor

Read = HFConfig | Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """One architecture.

    architecture: Hugging Face class name.
    config: function that reads a ``config.json``.
    names: function that yields every checkpoint tensor that the model uses, or every entry of a stacked
        tensor, once.
    is_ignored: whether a checkpoint may have a further tensor of that name, which is then not read.
    witness: function that names the tensor that must also be present for a tensor to be ignored, as proof
        that the ignored tensor is what it is assumed to be.
    """

    architecture: str
    config: Callable[[HFConfig], ModelConfig]
    names: Callable[[ModelConfig], Iterator[StoredTensor]]
    is_ignored: Callable[[ModelConfig, str], bool] = lambda cfg, name: False
    witness: Callable[[str], str | None] = lambda name: None


def quant_method(hf: HFConfig) -> Any:
    """Returns the method that ``quantization_config`` names, of any type, or None without a method."""
    config = hf.get("quantization_config") or None
    return config.get("quant_method") if isinstance(config, Mapping) else config


def common_fields(
    hf: HFConfig, *, experts: tuple[str, ...], inner_dim: str, interleaved: bool = False
) -> dict[str, Any]:
    """Returns the fields that every family spells in the same way, in the spellings of transformers 4 and 5.

    hf: config, with the family's defaults for absent fields.
    experts: possible names of the field with the number of experts.
    inner_dim: name of the field with the experts' inner dimension.
    interleaved: whether the rotary embedding pairs neighbouring dimensions.

    Raises a ValueError that names a missing or unsupported field.
    """
    act = hf.get("hidden_act", "silu")
    if act != "silu":
        raise ValueError(f"hidden_act {shown(act)} is not supported; supported: 'silu'")
    heads, hidden = require(hf, "num_attention_heads"), require(hf, "hidden_size")
    layers = require(hf, "num_hidden_layers")
    eos = hf.get("eos_token_id")
    return {
        "vocab_size": require(hf, "vocab_size"),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": hf.get("head_dim") or hidden // heads,
        "num_experts": require(hf, *experts),
        "num_experts_per_tok": require(hf, "num_experts_per_tok"),
        "moe_intermediate_size": require(hf, inner_dim),
        "max_position_embeddings": require(hf, "max_position_embeddings"),
        "rms_norm_eps": require(hf, "rms_norm_eps"),
        "rope": rope_config(hf, interleaved=interleaved),
        "tie_word_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "dtype": hf.get("dtype") or hf.get("torch_dtype") or "float32",
        "eos_token_ids": eos if isinstance(eos, tuple) else () if eos is None else (eos,),
        "bos_token_id": hf.get("bos_token_id"),
    }


def require(hf: Read, *names: str) -> Any:
    """Returns the value of the first field that the file has; a ValueError names the fields if it has
    none."""
    for name in names:
        if hf.get(name) is not None:
            return hf[name]
    raise ValueError(f"config.json has no {' or '.join(repr(n) for n in names)}")


def refuse(hf: HFConfig, field: str, unsupported: Any) -> None:
    """Raises ValueError if the value of ``field`` is one that the decoder does not implement."""
    if unsupported:
        raise ValueError(f"config.json: {field} = {shown(hf.get(field))} is not supported")


def rope_config(hf: Read, *, interleaved: bool = False) -> RopeConfig:
    """Reads the rotary embedding from ``rope_parameters`` (transformers 5) or ``rope_scaling`` and
    ``rope_theta`` (4)."""
    table = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
    table_values = hf.get(table) or {}
    kind = table_values.get("rope_type") or table_values.get("type") or "default"
    if kind not in get_args(RopeType):
        raise ValueError(
            f"rope type {shown(kind)} is not supported; supported: {', '.join(get_args(RopeType))}"
        )
    most, original = hf.get("max_position_embeddings"), "original_max_position_embeddings"
    values: dict[str, Any] = {
        name: typed(f"{table}.{name}", table_values[name], declared)
        for name, declared in _ROPE_FIELDS.items()
        if table_values.get(name) is not None
    }
    if "rope_theta" not in values:
        values["rope_theta"] = require(hf, "rope_theta")
    values.setdefault("partial_rotary_factor", hf.get("partial_rotary_factor") or 1.0)
    if kind != "default" and hf.get(original):
        values[original] = hf[original]  # it overrides the value in the table, as in transformers
    if most and (kind in ("longrope", "llama3") or (kind == "yarn" and values.get("factor"))):
        values.setdefault(original, most)
    if kind in ("yarn", "longrope") and most and values.get(original):
        values.setdefault("factor", most / values[original])
    return RopeConfig(rope_type=kind, interleaved=interleaved, **values)


_ROPE_FIELDS = {
    name: kind for name, kind in hints(RopeConfig).items() if name not in ("rope_type", "interleaved", "long")
}


def dense_layers(hf: HFConfig) -> tuple[int, ...]:
    """Returns the layers without experts, from Qwen's fields."""
    named, step = frozenset(hf.get("mlp_only_layers") or ()), hf.get("decoder_sparse_step") or 1
    layers = range(require(hf, "num_hidden_layers"))
    return tuple(i for i in layers if i in named or (i + 1) % step)


def qwen_fields(hf: HFConfig) -> dict[str, Any]:
    """Returns the fields that all Qwen generations share.

    hf: config, with the family's defaults for absent fields.
    """
    common = common_fields(
        hf, experts=("num_experts", "num_local_experts"), inner_dim="moe_intermediate_size"
    )
    dense = dense_layers(hf)
    return common | {
        "router": RouterConfig(norm_topk_prob=bool(hf.get("norm_topk_prob", False))),
        "mlp_only_layers": dense,
        "intermediate_size": hf["intermediate_size"] if dense else None,
        "sliding_window": hf.get("sliding_window") if hf.get("use_sliding_window", False) else None,
    }


def is_past_the_last_layer(cfg: ModelConfig, name: str) -> bool:
    """Returns whether a tensor belongs to a layer for multi-token prediction; the decoder has no such
    layers."""
    number = re.match(r"model\.layers\.([0-9]{1,9})\.", name)
    return number is not None and int(number[1]) >= cfg.num_hidden_layers


def prediction_witness(name: str) -> str:
    """Returns the name of the projection that only a layer for multi-token prediction has (arXiv 2412.19437,
    section 2.2). If it is missing, the layer is an ordinary one that ``num_hidden_layers`` leaves out by
    mistake."""
    return ".".join([*name.split(".")[:3], "eh_proj", "weight"])


def balanced_router(hf: HFConfig) -> RouterConfig:
    """Reads a router with sigmoid scores, balanced by a bias that only affects the choice (arXiv 2412.19437,
    section 2.1.2)."""
    return RouterConfig(
        scoring_func="sigmoid",
        norm_topk_prob=bool(hf["norm_topk_prob"]),
        n_group=hf["n_group"] or 1,  # null: all experts are one group
        topk_group=hf["topk_group"] or 1,
        group_score="top2",
        correction_bias=True,
        routed_scaling_factor=require(hf, "routed_scaling_factor"),
    )


def dense_and_shared(hf: HFConfig, inner: int) -> dict[str, Any]:
    """Returns the fields for dense first layers and for shared experts, each of inner size ``inner``."""
    dense = range(min(require(hf, "first_k_dense_replace"), require(hf, "num_hidden_layers")))
    return {
        "mlp_only_layers": tuple(dense),
        "intermediate_size": require(hf, "intermediate_size") if dense else None,
        "shared_expert_intermediate_size": inner * (hf.get("n_shared_experts") or 0),
    }
