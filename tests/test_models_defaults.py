"""The fields that a config.json leaves out, against what transformers' configuration classes put there."""

from typing import Any

import pytest

from jmoe.models import model_config

transformers = pytest.importorskip("transformers", reason="needs the parity extra")
pytestmark = pytest.mark.parity

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_experts": 12,
}
FAMILIES = {
    "MixtralForCausalLM": (transformers.MixtralConfig, {"intermediate_size": 20}),
    "Qwen3MoeForCausalLM": (transformers.Qwen3MoeConfig, {"moe_intermediate_size": 20}),
    "OlmoeForCausalLM": (transformers.OlmoeConfig, {"intermediate_size": 20}),
}
GIVEN: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 2, "rms_norm_eps": 1e-4, "tie_word_embeddings": True, "eos_token_id": [3, 4]},
    {"rope_theta": 777.0, "bos_token_id": 7, "eos_token_id": None, "sliding_window": None},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}, "num_experts_per_tok": 3},
    {"use_sliding_window": True, "norm_topk_prob": True, "attention_bias": True, "dtype": "bfloat16"},
    {"use_sliding_window": True, "sliding_window": 9, "max_position_embeddings": 555, "head_dim": 6},
)


def theirs(config: Any, architecture: str) -> dict[str, Any]:
    """The fields of ModelConfig that a transformers configuration states, as its model uses them."""
    same = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads "
        "num_experts_per_tok max_position_embeddings rms_norm_eps tie_word_embeddings bos_token_id"
    )
    ends = config.eos_token_id
    return {
        **{name: getattr(config, name) for name in same.split()},
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "num_experts": config.num_experts,
        "moe_intermediate_size": getattr(config, "moe_intermediate_size", config.intermediate_size),
        "rope_theta": config.rope_parameters["rope_theta"],
        "eos_token_ids": () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,),
        # Mixtral's model always renormalises and has no biases; OLMoE's has no window
        "norm_topk_prob": architecture == "MixtralForCausalLM" or config.norm_topk_prob,
        "attention_bias": architecture != "MixtralForCausalLM" and config.attention_bias,
        "sliding_window": None if architecture == "OlmoeForCausalLM" else config.sliding_window,
        "hidden_act": config.hidden_act,
    }


@pytest.mark.parametrize("given", GIVEN, ids=str)
@pytest.mark.parametrize("architecture", FAMILIES)
def test_absent_fields_are_those_of_transformers(architecture: str, given: dict[str, Any]):
    make, inner = FAMILIES[architecture]
    hf = {"architectures": [architecture], **SIZES, **inner, **given}
    want = theirs(make.from_dict(dict(hf)), architecture)
    assert want.pop("hidden_act") == "silu"
    got = model_config(hf)
    assert {name: getattr(got, name) for name in want} == want
    unread = set(got.__dataclass_fields__) - set(want)
    assert unread == {"architecture", "qk_norm", "dtype"}, "every field is compared"
