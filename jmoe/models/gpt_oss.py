"""gpt-oss (20b, 120b): MXFP4 experts with biases and a clamped activation, attention sinks, a sliding window
in every other layer."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from jmoe.config.model import LayerType, ModelConfig
from jmoe.config.parts import RouterConfig
from jmoe.models.family import Family, HFConfig, common_fields, quant_method, refuse
from jmoe.models.names import decoder_names, stacked_names
from jmoe.models.weights import Form, StoredTensor

# defaults of transformers' GptOssConfig for absent fields of config.json (sizes of weights are required)
DEFAULTS = {
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "sliding_window": 128,
    "attention_bias": True,
}


def config(hf: HFConfig) -> ModelConfig:
    scaled = hf.get("rope_parameters") or hf.get("rope_scaling")
    hf = hf.with_defaults(DEFAULTS | ({"rope_parameters": None, "rope_scaling": scaled} if scaled else {}))
    refuse(hf, "swiglu_limit", hf.get("swiglu_limit", 7.0) != 7.0)
    refuse(hf, "swiglu_alpha", hf.get("swiglu_alpha", 1.702) != 1.702)
    common = common_fields(hf, experts=("num_local_experts", "num_experts"), inner_dim="intermediate_size")
    kinds: tuple[LayerType, ...] = "sliding_attention", "full_attention"
    alternate: list[LayerType] = [kinds[i % 2] for i in range(common["num_hidden_layers"])]
    return ModelConfig(
        architecture="GptOssForCausalLM",
        **common,
        router=RouterConfig(norm_topk_prob=True, bias=True),
        hidden_act="swiglu_oai",
        expert_bias=True,
        layer_types=tuple(hf.get("layer_types") or alternate),
        sliding_window=hf["sliding_window"],
        attention_bias=bool(hf["attention_bias"]),
        attention_sinks=True,
        quant_method=quant_method(hf),
    )


def experts(cfg: ModelConfig, hf_prefix: str, prefix: str) -> Iterator[StoredTensor]:
    for name, path in (("weight", "gate_ED"), ("bias", "bias_E")):
        yield StoredTensor(f"{hf_prefix}.mlp.router.{name}", f"{prefix}.moe.router.{path}")
    name, path = f"{hf_prefix}.mlp.experts", f"{prefix}.moe.experts"
    down = Form(is_transposed=cfg.quant_method is None)
    gate_up = replace(down, row_layout="alternate")
    yield from stacked_names(cfg, f"{name}.gate_up_proj", f"{path}.gate_up_E2FD", gate_up)
    yield from stacked_names(cfg, f"{name}.down_proj", f"{path}.down_EDF", down)
    bias = Form(row_layout="alternate")
    yield from stacked_names(cfg, f"{name}.gate_up_proj_bias", f"{path}.gate_up_bias_E2F", bias)
    yield from stacked_names(cfg, f"{name}.down_proj_bias", f"{path}.down_bias_ED")


names = partial(decoder_names, experts=experts)
FAMILY = Family("GptOssForCausalLM", config, names)
