"""The tensors of a GGUF file that hold the parameters: names follow from the parameters' paths alone.

Families that keep all experts, or the gate and the up rows, in one tensor of a Hugging Face checkpoint have
the same separate stacks as the others here. Two writers of llama.cpp reorder the rows of queries and keys.
"""

from collections.abc import Container, Iterator
from dataclasses import replace

from jmoe.config.model import ModelConfig
from jmoe.models import get_family
from jmoe.models.weights import PLAIN, Form, StoredTensor

# Architectures whose rows of queries and keys have the two halves of a head in turn.
REORDERED = ("MixtralForCausalLM", "GraniteMoeForCausalLM")
# Architectures whose norm before the MLP has the name of a norm after attention.
NAMED_AFTER_ATTENTION = ("GptOssForCausalLM", "Glm4MoeForCausalLM")

TOP = {
    "embed": "token_embd.weight",
    "norm.scale_D": "output_norm.weight",
    "lm_head": "output.weight",
}
PROJECTIONS = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
ATTENTION = {
    **{f"attention.{letter}_proj": f"{name}.weight" for letter, name in PROJECTIONS.items()},
    **{f"attention.{letter}_bias": f"{name}.bias" for letter, name in PROJECTIONS.items()},
    "attention.q_norm": "attn_q_norm.weight",
    "attention.k_norm": "attn_k_norm.weight",
    "attention.sinks_H": "attn_sinks.weight",
}
LATENT = {
    "attention.q_proj": "attn_q.weight",
    "attention.q_a_proj": "attn_q_a.weight",
    "attention.q_b_proj": "attn_q_b.weight",
    "attention.q_norm": "attn_q_a_norm.weight",
    "attention.kv_a_proj": "attn_kv_a_mqa.weight",
    "attention.kv_b_proj": "attn_kv_b.weight",
    "attention.kv_norm": "attn_kv_a_norm.weight",
    "attention.o_proj": "attn_output.weight",
}
LAYER = {
    "input_norm.scale_D": "attn_norm.weight",
    "post_attention_norm.scale_D": "ffn_norm.weight",
    "mlp.down_DF": "ffn_down.weight",
    "shared.down_DF": "ffn_down_shexp.weight",
    "shared.share_1D": "ffn_gate_inp_shexp.weight",
    "moe.router.gate_ED": "ffn_gate_inp.weight",
    "moe.router.bias_E": "ffn_gate_inp.bias",
    "moe.router.correction_E": "exp_probs_b.bias",
    "moe.experts.down_EDF": "ffn_down_exps.weight",
    "moe.experts.down_bias_ED": "ffn_down_exps.bias",
}
GATE_UP = {  # parameters of which the gate and the up rows are two tensors
    "mlp.gate_up_2FD": ("ffn_gate.weight", "ffn_up.weight"),
    "shared.gate_up_2FD": ("ffn_gate_shexp.weight", "ffn_up_shexp.weight"),
    "moe.experts.gate_up_E2FD": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "moe.experts.gate_up_bias_E2F": ("ffn_gate_exps.bias", "ffn_up_exps.bias"),
}


def tensor_names(cfg: ModelConfig, found: Container[str] = ()) -> Iterator[StoredTensor]:
    """Yields every tensor of a model, or every entry of a stacked tensor, as a GGUF file names it.

    It raises ValueError for a parameter that has no name there.

    found: names of the file's tensors, since keys and values of latent attention have one of two forms.
    """
    layer_table = LAYER | (ATTENTION if cfg.latent is None else LATENT)
    if cfg.architecture in NAMED_AFTER_ATTENTION:
        layer_table["post_attention_norm.scale_D"] = "post_attention_norm.weight"
    for stored in get_family(cfg.architecture).names(cfg):
        top, _, rest = stored.path.partition(".")
        if top != "layers":
            yield replace(stored, name=_name(TOP, stored.path, stored))
            continue
        layer, _, path = rest.partition(".")
        expert = stored.index[0] if path.startswith("moe.experts.") else None
        plain = replace(stored, expert=expert, form=_form(cfg, path))
        if path == "attention.kv_b_proj" and f"blk.{layer}.attn_k_b.weight" in found:
            yield from _by_head(cfg, plain, f"blk.{layer}")
        elif path not in GATE_UP:
            yield replace(plain, name=f"blk.{layer}.{_name(layer_table, path, stored)}")
        else:
            front = () if expert is None else (expert,)
            halves = stored.index[len(front) :] or (0, 1)  # a tensor of the family may have both
            for half in halves:
                yield replace(plain, name=f"blk.{layer}.{GATE_UP[path][half]}", index=(*front, half))


def _by_head(cfg: ModelConfig, stored: StoredTensor, layer: str) -> Iterator[StoredTensor]:
    """Yields the rows of each head: those of keys, transposed, and then those of values."""
    assert cfg.latent is not None
    keys, size = cfg.latent.qk_nope_head_dim, cfg.latent.qk_nope_head_dim + cfg.latent.v_head_dim
    for head in range(cfg.num_attention_heads):
        first, middle, end = head * size, head * size + keys, (head + 1) * size
        entry = replace(stored, expert=head)
        transposed = Form(is_transposed=True)
        yield replace(entry, name=f"{layer}.attn_k_b.weight", rows=(first, middle), form=transposed)
        yield replace(entry, name=f"{layer}.attn_v_b.weight", rows=(middle, end))


def _name(table: dict[str, str], path: str, stored: StoredTensor) -> str:
    if path not in table:
        raise ValueError(f"tensor {stored.name!r} has no name in GGUF files")
    return table[path]


def _form(cfg: ModelConfig, path: str) -> Form:
    if cfg.architecture not in REORDERED:
        return PLAIN
    heads = {"q": cfg.num_attention_heads, "k": cfg.num_key_value_heads}
    rows = {f"attention.{letter}_{kind}": heads[letter] for letter in heads for kind in ("proj", "bias")}
    return Form(halved_heads=rows.get(path, 0))
