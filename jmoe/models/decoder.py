"""The decoder that the MoE families share: embed -> (attention, MoE) x layers -> norm -> logits.

Activations are float32 between the products; the products run in the weights' dtype with float32
accumulation. What differs between families is in ``ModelConfig`` (norms, biases, renormalisation) and in
the family's file beside this one (field and weight names).
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float
from jmoe_kernels.choice import Kernels, choose
from jmoe_kernels.matmul import Dense, linear
from jmoe_kernels.paged_attention import Heads, LayerPages, Span

from jmoe.config import ModelConfig, MoEConfig
from jmoe.mesh import EXPERT, TENSOR, Split, is_single, platform_of, split_attention
from jmoe.moe.binning import get_rule
from jmoe.moe.experts import HostExperts
from jmoe.moe.layer import Decision, MoELayer
from jmoe.moe.orders import Hints, Move, Order, ShuffleTables
from jmoe.moe.routing import route
from jmoe.moe.shuffle import Shuffle
from jmoe.moe.types import Changes, DispatchStats, Knobs, MoEOutput, Phase, Routing, TokenFlags
from jmoe.nn.attention import Attention, Sequences
from jmoe.nn.kv_cache import stored_kv_heads
from jmoe.nn.norm import rms_norm
from jmoe.nn.param import ParamMaker
from jmoe.nn.rope import Rotation, rotation
from jmoe.offload.cache import ExpertCache, Visit
from jmoe.offload.types import Predictor, StepSeen


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecoderOutput:
    """hidden_BTD: final normed states, float32. pages: the updated cache. routing, stats: one entry a
    layer, the router's own choices and what was done with them.

    changes_B: what lossy techniques did to each sequence, summed over tokens and layers; None without any.
    cache: of offloaded experts, after the step.
    """

    hidden_BTD: Float[Array, "B T D"]
    pages: list[LayerPages] | None
    routing: list[Routing]
    stats: list[DispatchStats]
    changes_B: Changes | None
    cache: ExpertCache | None


# the norm before a layer's MoE and its gate
Router = tuple[Array, Array]


class DecoderLayer(nnx.Module):
    def __init__(self, cfg: ModelConfig, moe: MoEConfig, split: Split, make: ParamMaker, kernels: Kernels):
        self.input_norm = make.ones(cfg.hidden_size)
        self.attention = Attention(cfg, split, make, kernels)
        self.post_attention_norm = make.ones(cfg.hidden_size)
        self.moe = MoELayer(cfg, moe, split.mesh, make, kernels)
        self.shuffle = Shuffle(split.mesh, cfg.num_experts)
        self.eps = cfg.rms_norm_eps

    def __call__(
        self,
        x_ND: Array,
        by: Rotation,
        seqs: Sequences,
        pages: LayerPages | None,
        knobs: Knobs | None,
        hints: Hints | None,
        before: Order | None,
        visit: Visit | None,
        ahead: list[Router] | None,
    ) -> tuple[Array, LayerPages | None, MoEOutput, Order | None]:
        """The rows behind the layer, the pages, what the experts did, and the order that the rows are in.

        hints: None leaves every token on its rank; with them rows come in the order ``before``, and each
        token's experts are computed where they likely are (see ``jmoe.moe.shuffle``). visit: of the cache
        where experts are offloaded; ahead: the routers of the next layers, where it asks them.
        """
        flags, move = token_flags(seqs), None
        if hints is not None and before is not None:
            with jax.named_scope("shuffle"):
                after = self.shuffle.order(hints, seqs.tokens_BT.reshape(-1), flags.valid_T)
                move, flags = Move(before, after), self.shuffle.deal(flags, after)
        x_ND, pages = self.attend(x_ND, by, seqs, pages, move)
        with jax.named_scope("moe"):
            normed_ND = rms_norm(x_ND, self.post_attention_norm[...], self.eps)
            if visit is not None and ahead is not None:
                visit = replace(visit, ahead_TAE=self.ask(x_ND, ahead))
            out = self.moe(normed_ND, flags, phase_of(seqs), knobs, visit)
            x_ND = x_ND + out.y_TD
        return x_ND, pages, out, move and move.after

    def attend(
        self, x_ND: Array, by: Rotation, seqs: Sequences, pages: LayerPages | None, move: Move | None = None
    ) -> tuple[Array, LayerPages | None]:
        """The rows behind attention, and the pages."""
        with jax.named_scope("attention"):
            normed_ND = rms_norm(x_ND, self.input_norm[...], self.eps)
            y_ND, pages = self.attention(normed_ND, by, seqs, pages, move)
            return y_ND + (x_ND if move is None else self.shuffle.move(x_ND, move)), pages

    def decide(
        self, x_ND: Array, seqs: Sequences, knobs: Knobs | None, here_E: Array | None
    ) -> tuple[Array, Decision]:
        """What the experts are to be given of the rows behind attention, and where it goes, on one device."""
        with jax.named_scope("moe"):
            normed_ND = rms_norm(x_ND, self.post_attention_norm[...], self.eps)
            return normed_ND, self.moe.decide(normed_ND, token_flags(seqs), knobs, phase_of(seqs), here_E)

    def ask(self, x_ND: Array, ahead: list[Router]) -> Float[Array, "N A E"]:
        """The scores that other layers' routers give to these rows."""
        cfg = self.moe.cfg

        def scores(norm_D: Array, gate_ED: Array) -> Array:
            logits_NE = linear(rms_norm(x_ND, norm_D, self.eps), gate_ED, self.moe.kernels.dense)
            return route(logits_NE, cfg.num_experts_per_tok, renormalize=cfg.norm_topk_prob).scores_TE

        return jnp.stack([scores(*router) for router in ahead], axis=1)


def phase_of(seqs: Sequences) -> Phase:
    return "decode" if seqs.positions_BT.shape[1] == 1 else "prefill"


def token_flags(seqs: Sequences) -> TokenFlags:
    """What each of the N = B * T tokens is."""
    exact_T = None
    if seqs.exact_B is not None:
        exact_T = jnp.broadcast_to(seqs.exact_B[:, None], seqs.positions_BT.shape).reshape(-1)
    return TokenFlags((seqs.positions_BT >= 0).reshape(-1), exact_T)


def step_seen(seqs: Sequences, x_ND: Float[Array, "N D"]) -> StepSeen | None:
    """What a predictor is shown of a decode step before its first layer; None of a prefill."""
    b, t = seqs.tokens_BT.shape
    if t > 1:
        return None
    seats_B = jnp.zeros(b, jnp.int32) if seqs.seats_B is None else seqs.seats_B
    return StepSeen(seqs.tokens_BT[:, 0], x_ND, seqs.positions_BT[:, 0] >= 0, seats_B)


def sum_changes(layers: list[Changes], seqs: Sequences) -> Changes | None:
    """Of each sequence, over its tokens and all layers; None where there are none."""
    if not layers:
        return None
    shape = seqs.tokens_BT.shape
    return jax.tree.map(lambda *counts: jnp.stack(counts).sum(0).reshape(shape).sum(1), *layers)


@partial(jax.jit, static_argnums=0)
def _apply(graph: nnx.GraphDef, state: nnx.State, *args):
    """One layer. Layers are alike, so under an outer jit they are traced and lowered once, not once each."""
    return nnx.merge(graph, state)(*args)


def kernels_for(cfg: ModelConfig, moe: MoEConfig, mesh: Mesh) -> Kernels:
    """What one rank of ``mesh`` computes the model with; raises ValueError for a kernel that cannot run."""
    experts, inner = cfg.num_experts // mesh.shape[EXPERT], cfg.moe_intermediate_size // mesh.shape[TENSOR]
    split = split_attention(mesh, moe.attention)
    q, kv = cfg.num_attention_heads // split.head_ranks, stored_kv_heads(cfg, split) // split.head_ranks
    dims, heads = (experts, inner, cfg.hidden_size), Heads(q, kv, cfg.head_dim, Span(cfg.sliding_window))
    binned = moe.binning and (cfg.num_experts, get_rule(moe.binning, cfg.num_experts_per_tok))
    kernels = choose(platform_of(mesh), cfg.dtype, moe.kernel, dims, heads, binned)
    if moe.binning is not None and (moe.binning.local_bonus or moe.binning.resident_bonus):
        return replace(kernels, binning="xla", why_binning="portable XLA: no kernel knows a bonus")
    return kernels


class Decoder(nnx.Module):
    """A decoder-only MoE language model. ``make`` gives its parameters' dtype and initial values."""

    def __init__(self, cfg: ModelConfig, moe: MoEConfig, mesh: Mesh, make: ParamMaker):
        kernels, split = kernels_for(cfg, moe, mesh), split_attention(mesh, moe.attention)
        head_axis = TENSOR if cfg.vocab_size % mesh.shape[TENSOR] == 0 else None
        self.embed = make((cfg.vocab_size, cfg.hidden_size), (None, None))
        self.layers = nnx.List(
            [DecoderLayer(cfg, moe, split, make, kernels) for _ in range(cfg.num_hidden_layers)]
        )
        if moe.offload is not None:
            sizes = cfg.num_hidden_layers, cfg.num_experts, cfg.hidden_size, cfg.moe_intermediate_size
            self.store = HostExperts(*sizes, make)
        self.norm = make.ones(cfg.hidden_size)
        if not cfg.tie_word_embeddings:
            self.lm_head = make((cfg.vocab_size, cfg.hidden_size), (head_axis, None))
        self.shuffle = Shuffle(mesh, cfg.num_experts)
        self.cfg, self.moe, self.mesh, self.split, self.kernels = cfg, moe, mesh, split, kernels
        # A head split over the mesh is multiplied by the compiler's own partitioning, which no kernel has.
        self.dense: Dense = kernels.dense if is_single(mesh) else "xla"

    def __call__(
        self,
        seqs: Sequences,
        pages: list[LayerPages] | None = None,
        knobs: Knobs | None = None,
        tables: list[ShuffleTables] | None = None,
        cache: ExpertCache | None = None,
    ) -> DecoderOutput:
        """One pass over ``seqs``: a window without a cache, or prefill / decode against ``pages``.

        knobs: None switches every lossy technique off. tables: one a layer, to shuffle tokens by. cache: of
        the experts, where they are offloaded.
        """
        b, t = seqs.tokens_BT.shape
        x_ND, by = self.begin(seqs)
        visit = None if cache is None else Visit.begin(self.store.weights, cache, step_seen(seqs, x_ND))
        outs: list[MoEOutput] = []
        been: list[Array] = []  # the rank of each token's experts, by layer, where tables ask for it
        order = home = self.shuffle.own_order(b * t) if tables else None
        new_pages: list[LayerPages] = []
        for i, layer in enumerate(self.layers):
            own_knobs = None if knobs is None else knobs.of(i)
            hints = Hints.make(tables[i], been) if tables else None
            x_ND, layer_pages, out, order = _apply(
                *nnx.split(layer), x_ND, by, seqs, pages[i] if pages else None, own_knobs, hints, order,
                visit, self.routers_after(i) if t == 1 else None,
            )  # fmt: skip
            visit, out = out.source, replace(out, source=None)
            if tables and order is not None:
                asks = i + 1 < len(tables) and tables[i + 1].by_history_HR is not None
                out, rank_N = self.shuffle.tell(out, order, history=asks)
                been += [] if rank_N is None else [rank_N]
            outs.append(out)
            if layer_pages is not None:
                new_pages.append(layer_pages)
        if order is not None and home is not None:
            x_ND = self.shuffle.move(x_ND, Move(order, home))
        hidden_BTD = self.finish(x_ND, seqs)
        changes_B = sum_changes([out.changes for out in outs if out.changes is not None], seqs)
        routing, stats = [out.routing for out in outs], [out.stats for out in outs]
        if visit is not None:
            cache = visit.end()
            cache = replace(cache, predictor=self.absorb(cache.predictor, seqs, routing))
        return DecoderOutput(hidden_BTD, new_pages or None, routing, stats, changes_B, cache)

    def begin(self, seqs: Sequences) -> tuple[Float[Array, "N D"], Rotation]:
        """The rows before the first layer, and how attention rotates them."""
        x_ND = self.embed[...][seqs.tokens_BT.reshape(-1)].astype(jnp.float32)
        return x_ND, rotation(seqs.positions_BT, self.cfg.head_dim, self.cfg.rope_theta)

    def finish(self, x_ND: Float[Array, "N D"], seqs: Sequences) -> Float[Array, "B T D"]:
        """The final states of the rows behind the last layer."""
        hidden_ND = rms_norm(x_ND, self.norm[...], self.cfg.rms_norm_eps)
        return hidden_ND.reshape(*seqs.tokens_BT.shape, -1)

    def absorb(self, predictor: Predictor, seqs: Sequences, routing: list[Routing]) -> Predictor:
        """The predictor, which has learned what a prompt chose; of a decode step it learns elsewhere."""
        b, t = seqs.tokens_BT.shape
        if t == 1 or seqs.seats_B is None:
            return predictor
        valid_BTK = (seqs.positions_BT >= 0)[..., None]
        rows_B1 = jnp.arange(b)[:, None]

        def counts(ids_NK: Array) -> Array:
            ids_BN = jnp.where(valid_BTK, ids_NK.reshape(b, t, -1), self.cfg.num_experts).reshape(b, -1)
            zeros_BE = jnp.zeros((b, self.cfg.num_experts), jnp.float32)
            return zeros_BE.at[rows_B1, ids_BN].add(1.0, mode="drop")

        counts_BLE = jnp.stack([counts(r.ids_TK) for r in routing], axis=1)
        fresh_B = seqs.positions_BT[:, 0] == 0
        return predictor.absorb(seqs.seats_B, fresh_B, counts_BLE)

    def routers_after(self, i: int) -> list[Router] | None:
        """Of as many layers as the predictor looks ahead, the last one for those past it."""
        offload = self.moe.offload
        if offload is None or offload.predictor != "next_gate":
            return None
        following = [min(i + 1 + a, len(self.layers) - 1) for a in range(offload.prefetch_distance)]
        layers = [self.layers[j] for j in following]
        return [(layer.post_attention_norm[...], layer.moe.gate_ED[...]) for layer in layers]

    def logits(self, hidden_ND: Float[Array, "*N D"]) -> Float[Array, "*N V"]:
        """Next-token logits in float32."""
        with jax.named_scope("logits"):
            return linear(
                hidden_ND, (self.embed if self.cfg.tie_word_embeddings else self.lm_head)[...], self.dense
            )
