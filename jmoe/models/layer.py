"""One layer of the decoder: attention, then experts or a dense MLP.

``DecoderLayer.__call__`` is not the only loop body: if the host drives offloaded experts, the parts of
``jmoe.engine.offload.host_parts`` call a layer's methods in its place. What is added to ``__call__`` must be
added there too; ``tests/engine/offload/test_host_runner.py`` shows that both give the same tokens and
decisions.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float
from jmoe_kernels.paged_attention import LayerPages

from jmoe.blueprint import Blueprint
from jmoe.models.journey import Journey, RouterAhead
from jmoe.moe.decide import Decision
from jmoe.moe.layer import MoELayer
from jmoe.moe.orders import Hints, Move, Order
from jmoe.moe.routing import choose_experts, likely, router_logits
from jmoe.moe.shuffle import Shuffle
from jmoe.moe.types import Knobs, MoEOutput, TokenFlags
from jmoe.nn.kinds import kind_of
from jmoe.nn.mlp import DenseMLP
from jmoe.nn.norm import Norm, normalize
from jmoe.nn.rope import Rotations
from jmoe.nn.sequences import Sequences
from jmoe.offload.cache import Visit
from jmoe.param import ParamMaker


class DecoderLayer(nnx.Module):
    """Attention, then experts (``moe``), optionally with a shared expert (``shared``), or a dense MLP
    (``mlp``)."""

    def __init__(self, blueprint: Blueprint, layer: int, make: ParamMaker):
        cfg = blueprint.cfg
        self.input_norm = Norm(cfg, make)
        self.attention = kind_of(cfg, layer)(blueprint, layer, make)
        self.post_attention_norm = Norm(cfg, make)
        sparse = layer not in cfg.mlp_only_layers
        dense, shared = cfg.intermediate_size or 0, cfg.shared_expert_intermediate_size
        self.mlp = None if sparse else DenseMLP(blueprint, dense, make)
        self.moe = MoELayer(blueprint, make) if sparse else None
        shares = cfg.shared_expert_gate
        self.shared = DenseMLP(blueprint, shared, make, shares) if sparse and shared else None
        self.shuffle = Shuffle(blueprint.mesh, cfg.num_experts)
        self.cfg = cfg

    def __call__(
        self, x_ND: Array, rotations: Rotations, seqs: Sequences, pages: LayerPages | None, journey: Journey
    ) -> tuple[Array, LayerPages | None, MoEOutput | None, Order | None]:
        """Runs the layer; returns its output rows, its pages, what its experts did (None for a dense layer)
        and the order of the rows (None if every token stays on its rank)."""
        flags, move = token_flags(seqs), None
        if journey.order is not None:
            with jax.named_scope("shuffle"):
                move = self.predict_move(seqs, flags, journey.order, journey.hints)
                flags = self.shuffle.deal(flags, move.new_order)
        x_ND, pages = self.attend(x_ND, rotations, seqs, pages, move)
        if self.moe is None:
            return self.pass_mlp(x_ND), pages, None, move and move.new_order
        with jax.named_scope("moe"):
            normed_ND = self.normed(x_ND)
            visit, routers = journey.visit, journey.next_routers
            source = None if visit is None else self.prepare(visit, x_ND, routers, move)
            out = self.moe(normed_ND, flags, seqs.phase, journey.knobs, source)
            x_ND = self.add(self.pass_shared(x_ND, normed_ND), out.y_TD)
        return x_ND, pages, out, move and move.new_order

    def predict_move(self, seqs: Sequences, flags: TokenFlags, order: Order, hints: Hints | None) -> Move:
        """Predicts the move of the rows to the ranks that likely hold their experts; without hints they
        stay."""
        if hints is None:
            return Move(order, order)
        return Move(order, self.shuffle.order(hints, seqs.tokens_RN.reshape(-1), flags.valid_T))

    def prepare(
        self, visit: Visit, x_ND: Array, next_routers: list[RouterAhead] | None, move: Move | None
    ) -> Visit:
        """Returns the visit with what this layer knows: the scores of later routers, and the rows' order."""
        if next_routers is not None:
            visit = replace(visit, next_scores_TAE=self.score_ahead(x_ND, next_routers))
        return visit if move is None else replace(visit, row_N=move.new_order.row_N)

    def add(self, x_ND: Array, y_ND: Array) -> Array:
        """Returns the sum of the residual and a block's output."""
        factor = self.cfg.residual_multiplier
        return x_ND + (y_ND if factor == 1 else y_ND * factor)

    def normed(self, x_ND: Array) -> Array:
        """Returns the input of the experts or the MLP: the rows, normalised."""
        return normalize(x_ND, self.post_attention_norm.weights, self.cfg.rms_norm_eps)

    def attend(
        self,
        x_ND: Array,
        rotations: Rotations,
        seqs: Sequences,
        pages: LayerPages | None,
        move: Move | None = None,
    ) -> tuple[Array, LayerPages | None]:
        """Returns the rows with attention's output added, and the pages."""
        with jax.named_scope("attention"):
            normed_ND = normalize(x_ND, self.input_norm.weights, self.cfg.rms_norm_eps)
            y_ND, pages = self.attention(normed_ND, rotations, seqs, pages, move)
            return self.add(x_ND if move is None else self.shuffle.move(x_ND, move), y_ND), pages

    def pass_mlp(self, x_ND: Array) -> Array:
        """Returns the rows with the dense MLP's output added."""
        assert self.mlp is not None
        with jax.named_scope("mlp"):
            return self.add(x_ND, self.mlp(self.normed(x_ND)))

    def pass_shared(self, x_ND: Array, normed_ND: Array) -> Array:
        """Returns the rows with the shared expert's output added, if there is a shared expert."""
        if self.shared is None:
            return x_ND
        with jax.named_scope("shared"):
            return self.add(x_ND, self.shared(normed_ND))

    def decide(
        self, x_ND: Array, seqs: Sequences, knobs: Knobs | None, resident_E: Array | None
    ) -> tuple[Array, Decision]:
        """Returns the experts' input, from the rows after attention, and where its tokens go, on one
        device."""
        assert self.moe is not None
        with jax.named_scope("moe"):
            normed_ND = self.normed(x_ND)
            return normed_ND, self.moe.decide(normed_ND, token_flags(seqs), knobs, seqs.phase, resident_E)

    def score_ahead(self, x_ND: Array, routers: list[RouterAhead]) -> Float[Array, "N A E"]:
        """Runs other layers' routers on these rows and returns each expert's share in their choice (see
        ``likely``)."""
        assert self.moe is not None
        dense, eps = self.moe.kernels.dense, self.cfg.rms_norm_eps

        def scores(router: RouterAhead) -> Array:
            logits_NE = router_logits(normalize(x_ND, router.norm, eps), router.router, dense)
            return likely(choose_experts(logits_NE, router.router, self.cfg))

        return jnp.stack([scores(router) for router in routers], axis=1)


def token_flags(seqs: Sequences) -> TokenFlags:
    """Returns the flags of each of the N tokens."""

    def each_T(of_B: list[Array]) -> Array:
        """Spreads a value of each row of a piece to the row's tokens."""
        shapes = [own.tokens_BT.shape for own in seqs.pieces]
        rows = [jnp.broadcast_to(b[:, None], shape) for b, shape in zip(of_B, shapes, strict=True)]
        return seqs.grid(rows).reshape(-1)

    exact, decoded_T = [own.exact_B for own in seqs.pieces if own.exact_B is not None], None
    if seqs.decoding is not None:
        decoded_T = each_T([jnp.full(len(own.tokens_BT), own is seqs.decoding) for own in seqs.pieces])
    valid_T = (seqs.positions_RN >= 0).reshape(-1)
    return TokenFlags(valid_T, each_T(exact) if exact else None, decoded_T=decoded_T)


def router_ahead(layer: DecoderLayer) -> RouterAhead:
    assert layer.moe is not None, "a dense layer has no router"
    return RouterAhead(layer.post_attention_norm.weights, layer.moe.router.weights)
