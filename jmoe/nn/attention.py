"""Grouped-query attention over a window of its own tokens, or over a paged KV cache.

Sequences and heads are split over the mesh as ``Split`` says. Where heads are split over ``expert`` too, a
rank's tokens are gathered before and scattered, summed, behind: each sends half of what an all-reduce does.
Where there are fewer KV heads than ranks, each rank keeps the one KV head that its query heads share.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Int
from jmoe_kernels import cpu
from jmoe_kernels.choice import Kernels
from jmoe_kernels.matmul import linear
from jmoe_kernels.paged_attention import LayerPages, NewTokens, Span, paged_attention

from jmoe.config import ModelConfig
from jmoe.mesh import EXPERT, TENSOR, TOKENS, Split, check_divides, is_single
from jmoe.moe.orders import Move
from jmoe.nn.kv_cache import page_spec
from jmoe.nn.norm import rms_norm
from jmoe.nn.param import ParamMaker
from jmoe.nn.rope import Rotation, rotate
from jmoe.nn.window import attend_window


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sequences:
    """The tokens of a step. positions_BT: -1 marks padding. table_BM: page tables, None without a cache.

    exact_B: sequences that opted out of lossy techniques; None = none did. seats_B: a number that each
    running request keeps (see ``Request.seat``).
    """

    tokens_BT: Int[Array, "B T"]
    positions_BT: Int[Array, "B T"]
    table_BM: Int[Array, "B M"] | None = None
    exact_B: Bool[Array, " B"] | None = None
    seats_B: Int[Array, " B"] | None = None


class Attention(nnx.Module):
    """Weights of one attention layer, ``[out, in]``; ``qk_norm`` as the family has it."""

    def __init__(self, cfg: ModelConfig, split: Split, make: ParamMaker, kernels: Kernels):
        ranks, over = split.head_ranks, " x ".join(split.heads)
        check_divides("attention heads", cfg.num_attention_heads, over, ranks)
        if cfg.num_key_value_heads < ranks:
            check_divides(over + " parallel size", ranks, "kv heads", cfg.num_key_value_heads)
        else:
            check_divides("kv heads", cfg.num_key_value_heads, over, ranks)
        d, head = cfg.hidden_size, cfg.head_dim
        q, kv = cfg.num_attention_heads * head, cfg.num_key_value_heads * head
        heads = split.heads
        kv_axis = heads if cfg.num_key_value_heads >= ranks else None
        self.q_proj = make((q, d), (heads, None))
        self.k_proj = make((kv, d), (kv_axis, None))
        self.v_proj = make((kv, d), (kv_axis, None))
        self.o_proj = make((d, q), (None, heads))
        if cfg.attention_bias:
            self.q_bias, self.k_bias = make((q,), (heads,)), make((kv,), (kv_axis,))
            self.v_bias, self.o_bias = make((kv,), (kv_axis,)), make((d,), (None,))
        if cfg.qk_norm == "head":
            self.q_norm, self.k_norm = make.ones(head), make.ones(head)
        elif cfg.qk_norm == "full":
            self.q_norm, self.k_norm = make.ones(q, (heads,)), make.ones(kv, (kv_axis,))
        self.cfg, self.split, self.kernels = cfg, split, kernels

    def __call__(
        self,
        x_ND: Float[Array, "N D"],
        by: Rotation,
        seqs: Sequences,
        pages: LayerPages | None,
        move: Move | None = None,
    ) -> tuple[Float[Array, "N D"], LayerPages | None]:
        """Attention output in float32 and the pages with this step's keys and values.

        Tokens come and go sequence after sequence, N = B * T, split over data and expert. move: with it
        those of the ranks that share their heads come in its order before and leave in its order after.
        """
        weights = {name: p[...] for name, p in nnx.state(self, nnx.Param).items()}
        if is_single(self.split.mesh):
            return self._shard(weights, x_ND, by, seqs, pages, None)
        specs = {
            name: PartitionSpec(*p.get_metadata("axes")) for name, p in nnx.state(self, nnx.Param).items()
        }
        tokens, sequences = PartitionSpec(TOKENS), PartitionSpec(self.split.sequences)
        paged = page_spec(self.kernels.attention, self.split)
        run = jax.shard_map(
            self._shard,
            mesh=self.split.mesh,
            in_specs=(specs, tokens, sequences, sequences, paged, sequences),
            out_specs=(tokens, paged),
            check_vma=False,
        )
        return run(weights, x_ND, by, seqs, pages, move)

    def _shard(
        self,
        w: dict[str, Array],
        x_ND: Array,
        by: Rotation,
        seqs: Sequences,
        pages: LayerPages | None,
        move: Move | None,
    ) -> tuple[Array, LayerPages | None]:
        x_ND = self._gather(x_ND, w["q_proj"].dtype)
        x_ND = x_ND if move is None else x_ND[move.before.row_N]
        x_BTD = x_ND.reshape(*seqs.positions_BT.shape, -1)
        with jax.named_scope("qkv"):
            q, k, v = self._project(w, x_BTD, by)
        span = Span(window=self.cfg.sliding_window)
        with jax.named_scope("attend"):
            if pages is None or seqs.table_BM is None:
                out = attend_window(q, k, v, seqs.positions_BT, span)
            else:
                new = NewTokens(q, k, v, seqs.positions_BT, seqs.table_BM)
                out, pages = paged_attention(self.kernels.attention, new, pages, span)
        with jax.named_scope("out"):
            y_ND = linear(out.reshape(-1, w["o_proj"].shape[1]), w["o_proj"], self.kernels.dense)
        y_ND = y_ND if move is None else y_ND[move.after.token_N]
        return self._scatter(y_ND) + _bias(w, "o_bias", 2), pages

    def _gather(self, x_ND: Array, dtype: jnp.dtype) -> Array:
        """The tokens of this rank's sequences, from the ranks that share their heads and split the tokens.

        In the weights' dtype, to which the projections round them anyway.
        """
        if is_single(self.split.mesh) or EXPERT not in self.split.heads:
            return x_ND
        return lax.all_gather(x_ND.astype(dtype), EXPERT, tiled=True)

    def _scatter(self, y_ND: Array) -> Array:
        """The sum over the ranks that share the heads, of the tokens that are this rank's."""
        if is_single(self.split.mesh):
            return y_ND
        if EXPERT in self.split.heads:
            y_ND = lax.psum_scatter(y_ND, EXPERT, tiled=True)
        return lax.psum(y_ND, TENSOR)

    def _project(self, w: dict[str, Array], x_BTD: Array, by: Rotation) -> tuple[Array, Array, Array]:
        cfg, (b, t, _), dense = self.cfg, x_BTD.shape, self.kernels.dense
        q, k, v = (linear(x_BTD, w[f"{n}_proj"], dense) + _bias(w, f"{n}_bias", 3) for n in "qkv")
        if dense == "cpu" and is_single(self.split.mesh):  # norm and rotation in one kernel
            q, k, v = (a.reshape(b, t, -1, cfg.head_dim) for a in (q, k, v))
            q = cpu.rotate(q, *by, w.get("q_norm"), cfg.rms_norm_eps)
            return q, cpu.rotate(k, *by, w.get("k_norm"), cfg.rms_norm_eps), v
        if cfg.qk_norm == "full":
            over = None if is_single(self.split.mesh) else self.split.heads
            q = rms_norm(q, w["q_norm"], cfg.rms_norm_eps, axis_name=over)
            split_kv = cfg.num_key_value_heads >= self.split.head_ranks
            k = rms_norm(k, w["k_norm"], cfg.rms_norm_eps, axis_name=over if split_kv else None)
        q, k, v = (a.reshape(b, t, -1, cfg.head_dim) for a in (q, k, v))
        if cfg.qk_norm == "head":
            q, k = (rms_norm(a, w[n], cfg.rms_norm_eps) for a, n in ((q, "q_norm"), (k, "k_norm")))
        k, v = self._own_kv_head(k), self._own_kv_head(v)
        return rotate(q, by), rotate(k, by), v

    def _own_kv_head(self, kv_BTHd: Array) -> Array:
        """The one KV head of this rank where the projection made them all."""
        ranks, heads = self.split.head_ranks, self.cfg.num_key_value_heads
        if heads >= ranks:
            return kv_BTHd
        mine = lax.axis_index(self.split.heads) // (ranks // heads)
        return lax.dynamic_slice_in_dim(kv_BTHd, mine, 1, axis=2)


def _bias(w: dict[str, Array], name: str, ndim: int) -> Array | float:
    return jnp.expand_dims(w[name].astype(jnp.float32), tuple(range(ndim - 1))) if name in w else 0.0
