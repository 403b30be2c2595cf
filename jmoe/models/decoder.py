"""The decoder that the MoE families share: embed -> (attention, MoE) x layers -> norm -> logits.

Activations are float32 between the products; the products run in the weights' dtype with float32
accumulation. What differs between families is in ``ModelConfig`` (norms, biases, renormalisation) and in
the family's file beside this one (field and weight names).
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float
from jmoe_kernels.choice import Kernels, choose
from jmoe_kernels.matmul import Dense, linear
from jmoe_kernels.paged_attention import Heads, LayerPages

from jmoe.config import ModelConfig, MoEConfig
from jmoe.mesh import EXPERT, TENSOR, is_single, platform_of
from jmoe.moe.layer import MoELayer
from jmoe.moe.types import DispatchStats
from jmoe.nn.attention import Attention, Sequences
from jmoe.nn.kv_cache import stored_kv_heads
from jmoe.nn.norm import rms_norm
from jmoe.nn.param import ParamMaker
from jmoe.nn.rope import Rotation, rotation


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecoderOutput:
    """hidden_BTD: final normed states, float32. pages: the updated cache. stats: one entry a layer."""

    hidden_BTD: Float[Array, "B T D"]
    pages: list[LayerPages] | None
    stats: list[DispatchStats]


class DecoderLayer(nnx.Module):
    def __init__(self, cfg: ModelConfig, moe: MoEConfig, mesh: Mesh, make: ParamMaker, kernels: Kernels):
        self.input_norm = make.ones(cfg.hidden_size)
        self.attention = Attention(cfg, mesh, make, kernels)
        self.post_attention_norm = make.ones(cfg.hidden_size)
        self.moe = MoELayer(cfg, moe, mesh, make, kernels)
        self.eps = cfg.rms_norm_eps

    def __call__(
        self, x_BTD: Array, by: Rotation, seqs: Sequences, pages: LayerPages | None
    ) -> tuple[Array, LayerPages | None, DispatchStats]:
        with jax.named_scope("attention"):
            y, pages = self.attention(rms_norm(x_BTD, self.input_norm[...], self.eps), by, seqs, pages)
            x_BTD = x_BTD + y
        with jax.named_scope("moe"):
            flat_TD = rms_norm(x_BTD, self.post_attention_norm[...], self.eps).reshape(-1, x_BTD.shape[-1])
            y_TD, stats = self.moe(flat_TD, (seqs.positions_BT >= 0).reshape(-1))
        return x_BTD + y_TD.reshape(x_BTD.shape), pages, stats


@partial(jax.jit, static_argnums=0)
def _apply(graph: nnx.GraphDef, state: nnx.State, *args):
    """One layer. Layers are alike, so under an outer jit they are traced and lowered once, not once each."""
    return nnx.merge(graph, state)(*args)


def kernels_for(cfg: ModelConfig, moe: MoEConfig, mesh: Mesh) -> Kernels:
    """What one rank of ``mesh`` computes the model with; raises ValueError for a kernel that cannot run."""
    tensor = mesh.shape[TENSOR]
    dims = cfg.num_experts // mesh.shape[EXPERT], cfg.moe_intermediate_size // tensor, cfg.hidden_size
    q, kv = cfg.num_attention_heads // tensor, stored_kv_heads(cfg, mesh) // tensor
    heads = Heads(q, kv, cfg.head_dim, cfg.sliding_window)
    return choose(platform_of(mesh), cfg.dtype, moe.kernel, dims, heads)


class Decoder(nnx.Module):
    """A decoder-only MoE language model. ``make`` gives its parameters' dtype and initial values."""

    def __init__(self, cfg: ModelConfig, moe: MoEConfig, mesh: Mesh, make: ParamMaker):
        kernels = kernels_for(cfg, moe, mesh)
        head_axis = TENSOR if cfg.vocab_size % mesh.shape[TENSOR] == 0 else None
        self.embed = make((cfg.vocab_size, cfg.hidden_size), (None, None))
        self.layers = nnx.List(
            [DecoderLayer(cfg, moe, mesh, make, kernels) for _ in range(cfg.num_hidden_layers)]
        )
        self.norm = make.ones(cfg.hidden_size)
        if not cfg.tie_word_embeddings:
            self.lm_head = make((cfg.vocab_size, cfg.hidden_size), (head_axis, None))
        self.cfg, self.mesh, self.kernels = cfg, mesh, kernels
        # A head split over the mesh is multiplied by the compiler's own partitioning, which no kernel has.
        self.dense: Dense = kernels.dense if is_single(mesh) else "xla"

    def __call__(self, seqs: Sequences, pages: list[LayerPages] | None = None) -> DecoderOutput:
        """One pass over ``seqs``: a window without a cache, or prefill / decode against ``pages``."""
        x_BTD = self.embed[...][seqs.tokens_BT].astype(jnp.float32)
        by = rotation(seqs.positions_BT, self.cfg.head_dim, self.cfg.rope_theta)
        stats: list[DispatchStats] = []
        new_pages: list[LayerPages] = []
        for i, layer in enumerate(self.layers):
            x_BTD, layer_pages, layer_stats = _apply(
                *nnx.split(layer), x_BTD, by, seqs, pages[i] if pages else None
            )
            stats.append(layer_stats)
            if layer_pages is not None:
                new_pages.append(layer_pages)
        hidden_BTD = rms_norm(x_BTD, self.norm[...], self.cfg.rms_norm_eps)
        return DecoderOutput(hidden_BTD, new_pages or None, stats)

    def logits(self, hidden_ND: Float[Array, "*N D"]) -> Float[Array, "*N V"]:
        """Next-token logits in float32."""
        with jax.named_scope("logits"):
            return linear(
                hidden_ND, (self.embed if self.cfg.tie_word_embeddings else self.lm_head)[...], self.dense
            )
