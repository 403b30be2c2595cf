"""The names under which checkpoints store a decoder's parameters; a family's file combines them."""

from collections.abc import Callable, Iterator
from functools import partial

from jmoe.config.model import ModelConfig
from jmoe.models.weights import PLAIN, Form, StoredTensor
from jmoe.nn.kinds import kind_of

# (cfg, the layer's prefix in the checkpoint, its prefix in the decoder) -> tensors of the experts' block
BlockNames = Callable[[ModelConfig, str, str], Iterator[StoredTensor]]


def decoder_names(cfg: ModelConfig, *, experts: BlockNames, dense: str = "mlp") -> Iterator[StoredTensor]:
    """Yields every tensor of a decoder once, under the names that most families share.

    experts: function that yields the tensors of a layer's experts, router and shared expert.
    dense: name of a dense MLP within a layer.
    """
    yield StoredTensor("model.embed_tokens.weight", "embed")
    yield from _norm(cfg, "model.norm", "norm")
    if not cfg.tie_word_embeddings:
        yield StoredTensor("lm_head.weight", "lm_head")
    if cfg.lm_head_bias:
        yield StoredTensor("lm_head.bias", "lm_head_bias_V")
    for i in range(cfg.num_hidden_layers):
        hf_prefix, prefix = f"model.layers.{i}", f"layers.{i}"
        yield from _norm(cfg, f"{hf_prefix}.input_layernorm", f"{prefix}.input_norm")
        yield from _norm(cfg, f"{hf_prefix}.post_attention_layernorm", f"{prefix}.post_attention_norm")
        for name, path in kind_of(cfg, i).names(cfg):
            yield StoredTensor(f"{hf_prefix}.self_attn.{name}", f"{prefix}.attention.{path}")
        if i in cfg.mlp_only_layers:
            yield from mlp_names(f"{hf_prefix}.{dense}", f"{prefix}.mlp")
        else:
            yield from experts(cfg, hf_prefix, prefix)


def mlp_names(hf_prefix: str, prefix: str) -> Iterator[StoredTensor]:
    """Yields the tensors of a dense gated MLP."""
    for half, name in enumerate(("gate_proj", "up_proj")):
        yield StoredTensor(f"{hf_prefix}.{name}.weight", f"{prefix}.gate_up_2FD", (half,))
    yield StoredTensor(f"{hf_prefix}.down_proj.weight", f"{prefix}.down_DF")


def expert_names(
    cfg: ModelConfig,
    hf_prefix: str,
    prefix: str,
    *,
    gate_up_down: tuple[str, str, str],
    router: str,
    block: str,
) -> Iterator[StoredTensor]:
    """Yields the tensors of a router and of experts that are stored separately. ``block`` is a name within
    the layer, the other names are within the block."""
    yield StoredTensor(f"{hf_prefix}.{block}.{router}.weight", f"{prefix}.moe.router.gate_ED")
    gate, up, down = gate_up_down
    for e in range(cfg.num_experts):
        name = f"{hf_prefix}.{block}.experts.{e}"
        yield StoredTensor(f"{name}.{gate}.weight", f"{prefix}.moe.experts.gate_up_E2FD", (e, 0))
        yield StoredTensor(f"{name}.{up}.weight", f"{prefix}.moe.experts.gate_up_E2FD", (e, 1))
        yield StoredTensor(f"{name}.{down}.weight", f"{prefix}.moe.experts.down_EDF", (e,))


def stacked_names(cfg: ModelConfig, name: str, path: str, form: Form = PLAIN) -> Iterator[StoredTensor]:
    """Yields the entries of one tensor that holds all experts."""
    for e in range(cfg.num_experts):
        yield StoredTensor(name, path, (e,), expert=e, form=form)


# Experts under the names of Qwen, DeepSeek, OLMoE and GLM, and under those of Mixtral and Phi.
qwen_experts = partial(
    expert_names, gate_up_down=("gate_proj", "up_proj", "down_proj"), router="gate", block="mlp"
)
mixtral_experts = partial(
    expert_names, gate_up_down=("w1", "w3", "w2"), router="gate", block="block_sparse_moe"
)


def deepseek_experts(cfg: ModelConfig, hf_prefix: str, prefix: str) -> Iterator[StoredTensor]:
    """Yields Qwen's names, with the router's correction and the shared expert, if the model has them."""
    yield from qwen_experts(cfg, hf_prefix, prefix)
    if cfg.router.correction_bias:
        name = f"{hf_prefix}.mlp.gate.e_score_correction_bias"
        yield StoredTensor(name, f"{prefix}.moe.router.correction_E")
    if cfg.shared_expert_intermediate_size:
        yield from mlp_names(f"{hf_prefix}.mlp.shared_experts", f"{prefix}.shared")


deepseek_names = partial(decoder_names, experts=deepseek_experts)


def _norm(cfg: ModelConfig, hf_prefix: str, prefix: str) -> Iterator[StoredTensor]:
    yield StoredTensor(f"{hf_prefix}.weight", f"{prefix}.scale_D")
    if cfg.norm == "layer":
        yield StoredTensor(f"{hf_prefix}.bias", f"{prefix}.bias_D")
