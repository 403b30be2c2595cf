"""The decoder that the MoE families share: embed -> (attention, experts or MLP) x layers -> norm -> logits.

Activations are float32 between the matrix products; the products run in the weights' dtype with float32
accumulation. Differences between families are in ``ModelConfig`` (norms, biases, routers, kinds of layers)
and in the family's own file in this folder (field and weight names).
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float
from jmoe_kernels.choice import choose_kernels
from jmoe_kernels.grouped_mlp import ExpertWeights
from jmoe_kernels.matmul import DenseKernel, linear
from jmoe_kernels.paged_attention import LayerPages
from jmoe_kernels.quantised import Quantised
from jmoe_kernels.settings import Activations

from jmoe.blueprint import UNQUANTISED, Blueprint, Codings
from jmoe.config.model import ModelConfig
from jmoe.config.moe import MoEConfig
from jmoe.mesh import EXPERT, TENSOR, is_single, platform_of, split_attention
from jmoe.models.journey import StepSettings
from jmoe.models.layer import DecoderLayer
from jmoe.models.predictor_views import step_view
from jmoe.models.step_techniques import Techniques
from jmoe.moe.binning import get_needs
from jmoe.moe.expert_leaves import local_codings
from jmoe.moe.experts import HostExperts
from jmoe.moe.shuffle import Shuffle
from jmoe.moe.types import Changes, DispatchStats, Routing
from jmoe.nn.kinds import kinds_of, paged_heads
from jmoe.nn.norm import Norm, normalize
from jmoe.nn.rope import Rotations, rotation
from jmoe.nn.sequences import Sequences
from jmoe.offload.cache import ExpertCache, Visit
from jmoe.param import ParamMaker


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecoderOutput:
    """The results of one pass of the decoder.

    hidden_RND: final normed states, float32, in the grid of ``Sequences``.
    pages: updated KV cache.
    routing: own choices of the router, one entry per layer with experts.
    stats: what was done with these choices, one entry per layer with experts.
    changes_B: what lossy techniques did to each sequence, summed over tokens and layers; decode sequences in
        the same step as prompts come first. None if no technique is on.
    cache: cache of offloaded experts, after the step.
    """

    hidden_RND: Float[Array, "R n D"]
    pages: list[LayerPages] | None
    routing: list[Routing]
    stats: list[DispatchStats]
    changes_B: Changes | None
    cache: ExpertCache | None


def sum_changes(layers: list[Changes], seqs: Sequences) -> Changes | None:
    """Returns the changes of each row of ``seqs``, summed over its tokens and all layers, or None if no layer
    has any."""
    if not layers:
        return None
    shape = seqs.positions_RN.shape

    def by_row(*counts_T: Array) -> Array:
        parts = seqs.cut(jnp.stack(counts_T).sum(0).reshape(shape))
        return jnp.concatenate([part.sum(1) for part in parts])

    return jax.tree.map(by_row, *layers)


@partial(jax.jit, static_argnums=0)
def _apply(graph: nnx.GraphDef, state: nnx.State, *args):
    """Runs one layer. Layers are alike, so under an outer jit they are traced and lowered once, not once
    each."""
    return nnx.merge(graph, state)(*args)


def make_blueprint(
    cfg: ModelConfig,
    moe: MoEConfig,
    mesh: Mesh,
    codings: Codings = UNQUANTISED,
    activations: Activations = "auto",
) -> Blueprint:
    """Decides how a model is built on ``mesh``: how attention is split, and which kernels a rank uses; raises
    ValueError for a kernel that cannot run, or codings that the mesh cannot split.

    codings: how the quantised parameters are stored, by path.
    activations: what kernels that multiply with codes round the other factor to.
    """
    experts, inner = cfg.num_experts // mesh.shape[EXPERT], cfg.moe_intermediate_size // mesh.shape[TENSOR]
    split = split_attention(mesh, moe.attention)
    dims = experts, inner, cfg.hidden_size
    needs = moe.binning and get_needs(moe.binning, cfg)
    kernels = choose_kernels(
        platform_of(mesh), cfg.dtype, moe.kernel, dims, paged_heads(cfg, split), needs,
        local_codings(cfg, codings, mesh),
    )  # fmt: skip
    return Blueprint(cfg, moe, split, replace(kernels, activations=activations), codings)


class Decoder(nnx.Module):
    """A decoder-only MoE language model. ``make`` sets its parameters' dtype and initial values."""

    def __init__(self, blueprint: Blueprint, make: ParamMaker):
        cfg, moe, mesh, kernels = blueprint.cfg, blueprint.moe, blueprint.mesh, blueprint.kernels
        head_axis = TENSOR if cfg.vocab_size % mesh.shape[TENSOR] == 0 else None
        make_embed = make.product if cfg.tie_word_embeddings else make  # a tied embedding is the head too
        self.embed = make_embed((cfg.vocab_size, cfg.hidden_size), (None, None))
        self.layers = nnx.List([DecoderLayer(blueprint, i, make) for i in range(cfg.num_hidden_layers)])
        if moe.offload is not None:
            self.store = HostExperts(cfg, make)
        self.norm = Norm(cfg, make)
        if not cfg.tie_word_embeddings:
            self.lm_head = make.product((cfg.vocab_size, cfg.hidden_size), (head_axis, None))
        self.lm_head_bias_V = make((cfg.vocab_size,), (head_axis,)) if cfg.lm_head_bias else None
        self.shuffle = Shuffle(mesh, cfg.num_experts)
        self.cfg, self.moe, self.mesh, self.split, self.kernels = cfg, moe, mesh, blueprint.split, kernels
        # If the head is split over the mesh, the compiler partitions its product; no kernel can do that.
        self.dense: DenseKernel = kernels.dense if is_single(mesh) else "xla"

    @property
    def expert_weights(self) -> ExpertWeights:
        """The experts of the first layer that has experts, or of all layers if they are offloaded."""
        if self.moe.offload is not None:
            return self.store.weights
        moe = self.layers[self.cfg.moe_layers[0]].moe
        assert moe is not None and moe.experts is not None
        return moe.experts.weights

    def __call__(
        self,
        seqs: Sequences,
        pages: list[LayerPages] | None = None,
        settings: StepSettings = StepSettings(),
        cache: ExpertCache | None = None,
    ) -> DecoderOutput:
        """Runs one pass over ``seqs``: a window without a cache, or prefill / decode with ``pages``.

        cache: cache of the experts, if they are offloaded.
        """
        x_ND, rotations = self.begin(seqs)
        visit = None if cache is None else Visit.begin(self.store.weights, cache, step_view(seqs, x_ND))
        techniques = Techniques(settings, self.shuffle, self.layers, seqs, len(x_ND), visit)
        new_pages: list[LayerPages] = []
        for i, layer in enumerate(self.layers):
            journey = techniques.journey(i)
            x_ND, layer_pages, out, order = _apply(
                *nnx.split(layer), x_ND, rotations, seqs, pages[i] if pages else None, journey
            )
            new_pages += [] if layer_pages is None else [layer_pages]
            techniques.collect(out, order)
        hidden_RND = self.finish(techniques.to_original_order(x_ND), seqs)
        outputs = techniques.outputs
        changes_B = sum_changes([out.changes for out in outputs if out.changes is not None], seqs)
        routing, stats = [out.routing for out in outputs], [out.stats for out in outputs]
        return DecoderOutput(
            hidden_RND, new_pages or None, routing, stats, changes_B, techniques.final_cache()
        )

    def begin(self, seqs: Sequences) -> tuple[Float[Array, "N D"], Rotations]:
        """Returns the rows before the first layer, and their rotations in attention."""
        cfg = self.cfg
        embed, ids_N = self.embed[...], seqs.tokens_RN.reshape(-1)
        rows_ND = embed.take_rows(ids_N) if isinstance(embed, Quantised) else embed[ids_N]
        x_ND = rows_ND.astype(jnp.float32)
        if cfg.embedding_multiplier != 1:
            x_ND = x_ND * cfg.embedding_multiplier
        dims = dict.fromkeys(kind.rotary_dim(cfg) for kind in kinds_of(cfg))
        return x_ND, {dim: rotation(seqs.positions_RN, dim, cfg.rope) for dim in dims}

    def finish(self, x_ND: Float[Array, "N D"], seqs: Sequences) -> Float[Array, "R n D"]:
        """Normalises the rows after the last layer and puts them back into the grid."""
        hidden_ND = normalize(x_ND, self.norm.weights, self.cfg.rms_norm_eps)
        return hidden_ND.reshape(*seqs.positions_RN.shape, -1)

    def logits(self, hidden_ND: Float[Array, "*N D"]) -> Float[Array, "*N V"]:
        """Returns next-token logits in float32."""
        with jax.named_scope("logits"):
            head = (self.embed if self.cfg.tie_word_embeddings else self.lm_head)[...]
            logits_NV = linear(hidden_ND, head, self.dense, self.kernels.activations)
            if self.lm_head_bias_V is not None:
                bias_V = self.lm_head_bias_V[...].astype(jnp.float32)
                logits_NV = logits_NV + jnp.expand_dims(bias_V, tuple(range(logits_NV.ndim - 1)))
            divisor = self.cfg.logits_scaling
            return logits_NV if divisor == 1 else logits_NV / divisor
