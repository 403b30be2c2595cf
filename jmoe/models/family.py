"""What a model family's file declares: how its Hugging Face config and weight names map onto the decoder."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jmoe.config import ModelConfig
from jmoe.models.weights import Stored

HFConfig = Mapping[str, Any]
WeightName = Stored


@dataclass(frozen=True)
class Family:
    """One architecture.

    names: every tensor of the checkpoint that the model has, or every entry of a stacked one, exactly once.
    ignored: whether a checkpoint may have a tensor of that name beside them, which is then not read.
    quantization: the methods (``quant_method``) in which its checkpoints are read beside plain ones.
    """

    architecture: str
    config: Callable[[HFConfig], ModelConfig]
    names: Callable[[ModelConfig], Iterator[WeightName]]
    ignored: Callable[[ModelConfig, str], bool] = lambda cfg, name: False
    quantization: tuple[str, ...] = ()


def common_fields(hf: HFConfig, *, experts: tuple[str, ...], inner: str) -> dict[str, Any]:
    """The fields that every family spells alike, read from transformers 4 and 5 spellings.

    hf: the config over the family's defaults. experts: names under which the number of experts may stand.
    inner: the experts' inner dimension.
    Raises ValueError naming a missing or unsupported field.
    """
    act = hf.get("hidden_act", "silu")
    if act != "silu":
        raise ValueError(f"hidden_act {act!r} is not supported; supported: 'silu'")
    heads, hidden = require(hf, "num_attention_heads"), require(hf, "hidden_size")
    eos = hf.get("eos_token_id")
    return {
        "vocab_size": require(hf, "vocab_size"),
        "hidden_size": hidden,
        "num_hidden_layers": require(hf, "num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": hf.get("head_dim") or hidden // heads,
        "num_experts": require(hf, *experts),
        "num_experts_per_tok": require(hf, "num_experts_per_tok"),
        "moe_intermediate_size": require(hf, inner),
        "max_position_embeddings": require(hf, "max_position_embeddings"),
        "rms_norm_eps": require(hf, "rms_norm_eps"),
        "rope_theta": rope_theta(hf),
        "tie_word_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "dtype": hf.get("dtype") or hf.get("torch_dtype") or "float32",
        "eos_token_ids": tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        "bos_token_id": hf.get("bos_token_id"),
    }


def require(hf: HFConfig, *names: str) -> Any:
    for name in names:
        if hf.get(name) is not None:
            return hf[name]
    raise ValueError(f"config.json has no {' or '.join(repr(n) for n in names)}")


def refuse(hf: HFConfig, field: str, unsupported: Any) -> None:
    """Raises ValueError where ``field`` has a value that the decoder does not implement."""
    if unsupported:
        raise ValueError(f"config.json: {field} = {hf.get(field)!r} is not supported")


def rope_theta(hf: HFConfig) -> float:
    """The rotary base from ``rope_parameters`` (transformers 5) or ``rope_theta`` (4); plain RoPE only."""
    parameters = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope type {kind!r} is not supported; supported: 'default'")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor below 1 is not supported")
    return float(parameters.get("rope_theta") or require(hf, "rope_theta"))


def weight_names(
    cfg: ModelConfig, *, gate: str, experts: str, gate_up_down: tuple[str, str, str]
) -> Iterator[WeightName]:
    """The names of the Llama-like layout; ``gate`` and ``experts`` are the MoE block's, below a layer."""
    yield Stored("model.embed_tokens.weight", "embed")
    yield Stored("model.norm.weight", "norm")
    if not cfg.tie_word_embeddings:
        yield Stored("lm_head.weight", "lm_head")
    for i in range(cfg.num_hidden_layers):
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        yield Stored(f"{theirs}.input_layernorm.weight", f"{ours}.input_norm")
        yield Stored(f"{theirs}.post_attention_layernorm.weight", f"{ours}.post_attention_norm")
        for p in "qkvo":
            yield Stored(f"{theirs}.self_attn.{p}_proj.weight", f"{ours}.attention.{p}_proj")
            if cfg.attention_bias:
                yield Stored(f"{theirs}.self_attn.{p}_proj.bias", f"{ours}.attention.{p}_bias")
        if cfg.qk_norm != "none":
            yield Stored(f"{theirs}.self_attn.q_norm.weight", f"{ours}.attention.q_norm")
            yield Stored(f"{theirs}.self_attn.k_norm.weight", f"{ours}.attention.k_norm")
        yield Stored(f"{theirs}.{gate}.weight", f"{ours}.moe.gate_ED")
        for e in range(cfg.num_experts):
            for half, name in enumerate(gate_up_down[:2]):
                yield Stored(
                    f"{theirs}.{experts}.{e}.{name}.weight", f"{ours}.moe.experts.gate_up_E2FD", (e, half)
                )
            name = gate_up_down[2]
            yield Stored(f"{theirs}.{experts}.{e}.{name}.weight", f"{ours}.moe.experts.down_EDF", (e,))
