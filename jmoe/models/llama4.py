"""Llama 4, the text model (Scout, Maverick): one expert per token, whose input is weighted by a sigmoid, and
a shared expert; attention in chunks except in layers without rotation."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from jmoe.config.model import LayerType, ModelConfig
from jmoe.config.parts import RouterConfig
from jmoe.models.family import Family, HFConfig, common_fields, require
from jmoe.models.names import decoder_names, mlp_names, stacked_names
from jmoe.models.weights import Form, StoredTensor

TEXT, WHOLE = "Llama4ForCausalLM", "Llama4ForConditionalGeneration"

# defaults of transformers' Llama4TextConfig for absent fields of config.json (sizes of weights are required)
DEFAULTS = {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_local_experts": 16,
    "num_experts_per_tok": 1,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "interleave_moe_layer_step": 1,
    "no_rope_layer_interval": 4,
    "attention_chunk_size": 8192,
    "attn_temperature_tuning": True,
    "attn_scale": 0.1,
    "floor_scale": 8192,
    "use_qk_norm": True,
}


def config(hf: HFConfig) -> ModelConfig:
    hf = hf.with_defaults(DEFAULTS)
    experts = "num_local_experts", "num_experts"
    common = common_fields(hf, experts=experts, inner_dim="intermediate_size", interleaved=True)
    layers, step = range(common["num_hidden_layers"]), require(hf, "interleave_moe_layer_step")
    sparse = hf.get("moe_layers")
    sparse = range(step - 1, len(layers), step) if sparse is None else sparse
    dense = tuple(i for i in layers if i not in frozenset(sparse))
    turning = require(hf, "no_rope_layer_interval")
    rotating = hf.get("no_rope_layers") or [int((i + 1) % turning != 0) for i in layers]
    rotating = rotating[: len(layers)]
    chunked: LayerType = "chunked_attention" if hf["attention_chunk_size"] else "full_attention"
    own: list[LayerType] = [chunked if turns else "full_attention" for turns in rotating]
    return ModelConfig(
        architecture=TEXT,
        **common,
        router=RouterConfig(scoring_func="sigmoid", norm_topk_prob=False, weigh_input=True),
        mlp_only_layers=dense,
        intermediate_size=require(hf, "intermediate_size_mlp") if dense else None,
        shared_expert_intermediate_size=common["moe_intermediate_size"],
        no_rope_layers=tuple(rotating),
        layer_types=tuple(hf.get("layer_types") or own),
        attention_chunk_size=hf["attention_chunk_size"],
        attention_bias=bool(hf.get("attention_bias", False)),
        qk_norm="l2" if hf["use_qk_norm"] else "none",
        attn_scale=require(hf, "attn_scale") if hf["attn_temperature_tuning"] else 0.0,
        floor_scale=require(hf, "floor_scale"),
    )


def experts(cfg: ModelConfig, hf_prefix: str, prefix: str) -> Iterator[StoredTensor]:
    block, path = f"{hf_prefix}.feed_forward", f"{prefix}.moe.experts"
    yield StoredTensor(f"{block}.router.weight", f"{prefix}.moe.router.gate_ED")
    gate_up, down = Form(row_layout="halves", is_transposed=True), Form(is_transposed=True)
    yield from stacked_names(cfg, f"{block}.experts.gate_up_proj", f"{path}.gate_up_E2FD", gate_up)
    yield from stacked_names(cfg, f"{block}.experts.down_proj", f"{path}.down_EDF", down)
    yield from mlp_names(f"{block}.shared_expert", f"{prefix}.shared")


names = partial(decoder_names, experts=experts, dense="feed_forward")
FAMILY = Family(TEXT, config, names)


def whole_config(hf: HFConfig) -> ModelConfig:
    """Reads the config of the text model of a checkpoint that also reads images."""
    require(hf, "text_config")
    own = {key: hf[key] for key in ("dtype", "torch_dtype", "eos_token_id") if hf.get(key) is not None}
    return replace(config(hf.table("text_config").with_values(own)), architecture=WHOLE)


def whole_names(cfg: ModelConfig) -> Iterator[StoredTensor]:
    for each in names(cfg):
        yield replace(each, name=f"language_model.{each.name}")


def is_vision(cfg: ModelConfig, name: str) -> bool:
    return name.startswith(("vision_model.", "multi_modal_projector."))


WITH_IMAGES = Family(WHOLE, whole_config, whole_names, is_vision)
