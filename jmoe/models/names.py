"""The names under which checkpoints store a decoder's parameters; a family's file combines them."""

from collections.abc import Callable, Iterator
from functools import partial

from jmoe.config.model import ModelConfig
from jmoe.models.weights import PLAIN, Form, Stored
from jmoe.nn.kinds import kind_of

# (cfg, the layer's prefix in the checkpoint, its prefix in the decoder) -> tensors of the experts' block
BlockNames = Callable[[ModelConfig, str, str], Iterator[Stored]]


def decoder_names(cfg: ModelConfig, *, experts: BlockNames, dense: str = "mlp") -> Iterator[Stored]:
    """Yields every tensor of a decoder once, under the names that most families share.

    experts: yields the tensors of a layer's experts, router and shared expert. dense: the name of a dense MLP
    within a layer.
    """
    yield Stored("model.embed_tokens.weight", "embed")
    yield from _norm(cfg, "model.norm", "norm")
    if not cfg.tie_word_embeddings:
        yield Stored("lm_head.weight", "lm_head")
    if cfg.lm_head_bias:
        yield Stored("lm_head.bias", "lm_head_bias_V")
    for i in range(cfg.num_hidden_layers):
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        yield from _norm(cfg, f"{theirs}.input_layernorm", f"{ours}.input_norm")
        yield from _norm(cfg, f"{theirs}.post_attention_layernorm", f"{ours}.post_attention_norm")
        for name, path in kind_of(cfg, i).names(cfg):
            yield Stored(f"{theirs}.self_attn.{name}", f"{ours}.attention.{path}")
        if i in cfg.mlp_only_layers:
            yield from mlp_names(f"{theirs}.{dense}", f"{ours}.mlp")
        else:
            yield from experts(cfg, theirs, ours)


def mlp_names(theirs: str, ours: str) -> Iterator[Stored]:
    """The tensors of a dense gated MLP."""
    for half, name in enumerate(("gate_proj", "up_proj")):
        yield Stored(f"{theirs}.{name}.weight", f"{ours}.gate_up_2FD", (half,))
    yield Stored(f"{theirs}.down_proj.weight", f"{ours}.down_DF")


def expert_names(
    cfg: ModelConfig, theirs: str, ours: str, *, gate_up_down: tuple[str, str, str], router: str, block: str
) -> Iterator[Stored]:
    """The tensors of a router and of experts that are stored separately. ``block`` is a name within the
    layer, the other names are within the block."""
    yield Stored(f"{theirs}.{block}.{router}.weight", f"{ours}.moe.router.gate_ED")
    gate, up, down = gate_up_down
    for e in range(cfg.num_experts):
        name = f"{theirs}.{block}.experts.{e}"
        yield Stored(f"{name}.{gate}.weight", f"{ours}.moe.experts.gate_up_E2FD", (e, 0))
        yield Stored(f"{name}.{up}.weight", f"{ours}.moe.experts.gate_up_E2FD", (e, 1))
        yield Stored(f"{name}.{down}.weight", f"{ours}.moe.experts.down_EDF", (e,))


def stacked_names(cfg: ModelConfig, name: str, path: str, form: Form = PLAIN) -> Iterator[Stored]:
    """The entries of one tensor that holds all experts."""
    for e in range(cfg.num_experts):
        yield Stored(name, path, (e,), part=e, form=form)


# Experts under the names of Qwen, DeepSeek, OLMoE and GLM, and under those of Mixtral and Phi.
qwen_experts = partial(
    expert_names, gate_up_down=("gate_proj", "up_proj", "down_proj"), router="gate", block="mlp"
)
mixtral_experts = partial(
    expert_names, gate_up_down=("w1", "w3", "w2"), router="gate", block="block_sparse_moe"
)


def _norm(cfg: ModelConfig, theirs: str, ours: str) -> Iterator[Stored]:
    yield Stored(f"{theirs}.weight", f"{ours}.scale_D")
    if cfg.norm == "layer":
        yield Stored(f"{theirs}.bias", f"{ours}.bias_D")
