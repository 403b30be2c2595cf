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
from jmoe_kernels.choice import choose as choose_kernels
from jmoe_kernels.matmul import DenseKernel, linear
from jmoe_kernels.paged_attention import Heads, LayerPages, Span

from jmoe.blueprint import Blueprint
from jmoe.config.model import ModelConfig
from jmoe.config.moe import MoEConfig
from jmoe.mesh import EXPERT, TENSOR, is_single, platform_of, split_attention
from jmoe.models.journey import RouterAhead, StepSettings, Techniques
from jmoe.models.layer import DecoderLayer, router_ahead
from jmoe.moe.binning import get_rule
from jmoe.moe.experts import HostExperts
from jmoe.moe.shuffle import Shuffle
from jmoe.moe.types import Changes, DispatchStats, Routing
from jmoe.nn.kinds import kind_of
from jmoe.nn.norm import Norm, normalize
from jmoe.nn.rope import Rotation, rotation
from jmoe.nn.sequences import Sequences
from jmoe.offload.cache import ExpertCache, Visit
from jmoe.offload.ranks import SAME
from jmoe.offload.types import Predictor, StepView
from jmoe.param import ParamMaker


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecoderOutput:
    """What one pass of the decoder returns.

    hidden_RND: final normed states, float32, in the grid of ``Sequences``.
    pages: updated KV cache.
    routing: router's own choices, one entry per layer with experts.
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


def step_view(seqs: Sequences, x_ND: Float[Array, "N D"]) -> StepView | None:
    """Returns what a predictor sees of a decode step before the first layer, or None for a prefill."""
    if seqs.phase != "decode":
        return None
    seats_B = jnp.zeros(len(seqs.tokens_BT), jnp.int32) if seqs.seats_B is None else seqs.seats_B
    return StepView(seqs.tokens_BT[:, 0], x_ND, seqs.positions_BT[:, 0] >= 0, seats_B)


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


def make_blueprint(cfg: ModelConfig, moe: MoEConfig, mesh: Mesh) -> Blueprint:
    """Decides how a model is built on ``mesh``: how attention is split, and which kernels a rank uses; raises
    ValueError for a kernel that cannot run."""
    experts, inner = cfg.num_experts // mesh.shape[EXPERT], cfg.moe_intermediate_size // mesh.shape[TENSOR]
    split = split_attention(mesh, moe.attention)
    cached = kind_of(cfg, 0).cached_heads(cfg)
    q, kv = cfg.num_attention_heads // split.head_ranks, cached.heads_per_array(split) // split.head_ranks
    spans = [span for span in map(cfg.span, range(cfg.num_hidden_layers)) if span != Span()]
    span = spans[0] if spans else Span()
    heads = Heads(q, kv, cached.dim, span, cfg.attention_sinks, cached.value_dim)
    dims = experts, inner, cfg.hidden_size
    binned = moe.binning and (cfg.num_experts, get_rule(moe.binning, cfg.num_experts_per_tok))
    kernels = choose_kernels(platform_of(mesh), cfg.dtype, moe.kernel, dims, heads, binned)
    if moe.binning is not None and (moe.binning.local_bonus or moe.binning.resident_bonus):
        kernels = replace(kernels, binning="xla", why_binning="portable XLA: no kernel knows a bonus")
    elif moe.binning is not None and not cfg.router.is_plain:
        why = "portable XLA: kernels know the softmax router alone"
        kernels = replace(kernels, binning="xla", why_binning=why)
    return Blueprint(cfg, moe, split, kernels)


class Decoder(nnx.Module):
    """A decoder-only MoE language model. ``make`` sets its parameters' dtype and initial values."""

    def __init__(self, blueprint: Blueprint, make: ParamMaker):
        cfg, moe, mesh, kernels = blueprint.cfg, blueprint.moe, blueprint.mesh, blueprint.kernels
        head_axis = TENSOR if cfg.vocab_size % mesh.shape[TENSOR] == 0 else None
        self.embed = make((cfg.vocab_size, cfg.hidden_size), (None, None))
        self.layers = nnx.List([DecoderLayer(blueprint, i, make) for i in range(cfg.num_hidden_layers)])
        if moe.offload is not None:
            self.store = HostExperts(cfg, make)
        self.norm = Norm(cfg, make)
        if not cfg.tie_word_embeddings:
            self.lm_head = make((cfg.vocab_size, cfg.hidden_size), (head_axis, None))
        self.lm_head_bias_V = make((cfg.vocab_size,), (head_axis,)) if cfg.lm_head_bias else None
        self.shuffle = Shuffle(mesh, cfg.num_experts)
        self.cfg, self.moe, self.mesh, self.split, self.kernels = cfg, moe, mesh, blueprint.split, kernels
        # If the head is split over the mesh, the compiler partitions its product; no kernel can do that.
        self.dense: DenseKernel = kernels.dense if is_single(mesh) else "xla"

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
        x_ND, rotation = self.begin(seqs)
        visit = None if cache is None else Visit.begin(self.store.weights, cache, step_view(seqs, x_ND))
        techniques = Techniques(settings, self.shuffle, len(x_ND), visit)
        new_pages: list[LayerPages] = []
        for i, layer in enumerate(self.layers):
            routers = self.routers_after(i) if seqs.phase == "decode" else None
            journey = techniques.journey(has_experts=layer.moe is not None, next_routers=routers)
            x_ND, layer_pages, out, order = _apply(
                *nnx.split(layer), x_ND, rotation, seqs, pages[i] if pages else None, journey
            )
            new_pages += [] if layer_pages is None else [layer_pages]
            techniques.collect(out, order)
        hidden_RND = self.finish(techniques.to_original_order(x_ND), seqs)
        outputs = techniques.outputs
        changes_B = sum_changes([out.changes for out in outputs if out.changes is not None], seqs)
        routing, stats = [out.routing for out in outputs], [out.stats for out in outputs]
        if techniques.visit is not None:
            cache = techniques.visit.end()
            predictor = self.absorb(cache.predictor, seqs, routing)
            cache = replace(cache, predictor=cache.ranks.constrain(predictor, SAME))
        return DecoderOutput(hidden_RND, new_pages or None, routing, stats, changes_B, cache)

    def begin(self, seqs: Sequences) -> tuple[Float[Array, "N D"], Rotation]:
        """Returns the rows before the first layer, and their rotation in attention."""
        cfg = self.cfg
        x_ND = self.embed[...][seqs.tokens_RN.reshape(-1)].astype(jnp.float32)
        if cfg.embedding_multiplier != 1:
            x_ND = x_ND * cfg.embedding_multiplier
        return x_ND, rotation(seqs.positions_RN, cfg.rotary_dim, cfg.rope)

    def finish(self, x_ND: Float[Array, "N D"], seqs: Sequences) -> Float[Array, "R n D"]:
        """Normalises the rows after the last layer and puts them back into the grid."""
        hidden_ND = normalize(x_ND, self.norm.weights, self.cfg.rms_norm_eps)
        return hidden_ND.reshape(*seqs.positions_RN.shape, -1)

    def absorb(self, predictor: Predictor, seqs: Sequences, routing: list[Routing]) -> Predictor:
        """Returns the predictor after it has learned what prompts chose; from decode steps it learns
        elsewhere."""
        if seqs.phase == "decode" or seqs.seats_B is None:
            return predictor
        (b, _), grid = seqs.tokens_BT.shape, seqs.positions_RN.shape
        valid_BTK = (seqs.positions_BT >= 0)[..., None]
        rows_B1 = jnp.arange(b)[:, None]

        def counts(ids_NK: Array) -> Array:
            ids_BTK = seqs.cut(ids_NK.reshape(*grid, -1))[-1]
            ids_BN = jnp.where(valid_BTK, ids_BTK, self.cfg.num_experts).reshape(b, -1)
            zeros_BE = jnp.zeros((b, self.cfg.num_experts), jnp.float32)
            return zeros_BE.at[rows_B1, ids_BN].add(1.0, mode="drop")

        counts_BLE = jnp.stack([counts(r.ids_TK) for r in routing], axis=1)
        fresh_B = seqs.positions_BT[:, 0] == 0 if seqs.fresh_B is None else seqs.fresh_B
        return predictor.absorb(seqs.seats_B, fresh_B, counts_BLE)

    def routers_after(self, i: int) -> list[RouterAhead] | None:
        """Returns the routers of the next layers with experts, as many as the predictor looks ahead; after
        the last such layer, that layer repeats. It returns None if the predictor does not use them."""
        offload = self.moe.offload
        if offload is None or offload.predictor != "next_gate":
            return None
        later = [j for j in self.cfg.moe_layers if j > i] or [self.cfg.moe_layers[-1]]
        following = [later[min(a, len(later) - 1)] for a in range(offload.prefetch_distance)]
        return [router_ahead(self.layers[j]) for j in following]

    def logits(self, hidden_ND: Float[Array, "*N D"]) -> Float[Array, "*N V"]:
        """Returns next-token logits in float32."""
        with jax.named_scope("logits"):
            head = (self.embed if self.cfg.tie_word_embeddings else self.lm_head)[...]
            logits_NV = linear(hidden_ND, head, self.dense)
            if self.lm_head_bias_V is not None:
                bias_V = self.lm_head_bias_V[...].astype(jnp.float32)
                logits_NV = logits_NV + jnp.expand_dims(bias_V, tuple(range(logits_NV.ndim - 1)))
            divisor = self.cfg.logits_scaling
            return logits_NV if divisor == 1 else logits_NV / divisor
