"""Attention over a window of its own tokens, or over a paged KV cache: the code that its kinds share.

Sequences and heads are split over the mesh as ``Split`` says. If heads are split over ``expert`` too, tokens
are gathered before attention, and its outputs are summed and scattered after it: each of the two sends half
of what an all-reduce does. If there are fewer KV heads than ranks, each rank keeps the one KV head that its
query heads share.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import PartitionSpec
from jaxtyping import Float
from jmoe_kernels.paged_attention import AttentionKernel, LayerPages, NewTokens, attend_all

from jmoe.blueprint import Blueprint
from jmoe.config.model import ModelConfig
from jmoe.mesh import EXPERT, TENSOR, TOKENS, Split, check_divides, is_single
from jmoe.moe.orders import Move
from jmoe.nn.kv_cache import CachedHeads, StateSizes, page_layout, page_spec
from jmoe.nn.rope import Rotation, Rotations
from jmoe.nn.sequences import Sequences
from jmoe.nn.uncached import attend_uncached
from jmoe.param import ParamMaker, specs_of

Weights = dict[str, Any]  # arrays, or quantised weights
# (weights, x_BTD, rotation, positions_BT) -> queries [B, T, H, d], keys and values [B, T, G, d] of one rank's
# heads; values are None if each key is its own value
Project = Callable[[Weights, Array, Rotation, Array], tuple[Array, Array, Array | None]]


class Attention(nnx.Module):
    """One layer's attention; a subclass is a kind of attention, see ``jmoe.nn.kinds``.

    A kind declares its weights, ``[out, in]``, with an ``o_proj`` among them, and their names in checkpoints
    (``names``). It says how much of a query rotates (``rotary_dim``), makes queries, keys and values
    (``project``) and turns the weighted sums into outputs (``read_out``). Its state lies in pages unless it
    says otherwise (``state_axis``, ``state_layout``).

    scale: factor of the scores; None is one over the root of a query's dimension.
    state_axis: what the first axis of the state counts. Pages are shared and copied, a seat belongs to one
        request.
    """

    scale: float | None
    project: Project
    state_axis: ClassVar[Literal["page", "seat"]] = "page"

    @classmethod
    @abstractmethod
    def names(cls, cfg: ModelConfig) -> Iterator[tuple[str, str]]:
        """Yields pairs of a tensor's name in the checkpoint's attention block and the parameter that it
        fills."""

    @classmethod
    @abstractmethod
    def rotary_dim(cls, cfg: ModelConfig) -> int:
        """Returns the number of dimensions of a query that may rotate."""

    @classmethod
    @abstractmethod
    def query_dim(cls, cfg: ModelConfig) -> int:
        """Returns the number of dimensions of a head's query."""

    @classmethod
    @abstractmethod
    def cached_heads(cls, cfg: ModelConfig) -> CachedHeads:
        """Returns what the layer caches of each token."""

    @classmethod
    def state_layout(
        cls, cfg: ModelConfig, split: Split, kernel: AttentionKernel, sizes: StateSizes
    ) -> LayerPages:
        """Returns the layer's state, as shapes with dtypes and shardings."""
        return page_layout(cls.cached_heads(cfg), cfg, split, kernel, sizes)

    def __init__(self, blueprint: Blueprint, layer: int, make: ParamMaker):
        """Checks that the heads can be split; a kind then makes its weights with ``make``."""
        cfg, split = blueprint.cfg, blueprint.split
        ranks, over = split.head_ranks, " x ".join(split.heads)
        check_divides("attention heads", cfg.num_attention_heads, over, ranks)
        cached = self.cached_heads(cfg).num_heads
        if cached < ranks:
            check_divides(over + " parallel size", ranks, "kv heads", cached)
        else:
            check_divides("kv heads", cached, over, ranks)
        self.cfg, self.split, self.kernels = cfg, split, blueprint.kernels
        cfg.rope.check(self.rotary_dim(cfg))
        self.span, self.has_rotation = cfg.span(layer), cfg.rotates(layer)

    @property
    def state_spec(self) -> PartitionSpec:
        """The split of the state over the mesh."""
        return page_spec(self.kernels.attention, self.split)

    def read_out(self, w: Weights, out_BTHd: Array) -> Float[Array, "B T H v"]:
        """Makes the heads' outputs from the weighted sums of values."""
        return out_BTHd

    def __call__(
        self,
        x_ND: Float[Array, "N D"],
        rotations: Rotations,
        seqs: Sequences,
        pages: LayerPages | None,
        move: Move | None = None,
    ) -> tuple[Float[Array, "N D"], LayerPages | None]:
        """Returns the attention's output in float32 and the pages with this step's keys and values.

        Tokens enter and leave sequence after sequence, N = B * T, split over data and expert.

        move: change of the order of the tokens of the ranks that share their heads: they enter in its
            ``old_order`` and leave in its ``new_order``. None keeps the order.
        """
        weights = {name: p[...] for name, p in nnx.state(self, nnx.Param).items()}
        rotation = rotations[self.rotary_dim(self.cfg)]
        if is_single(self.split.mesh):
            return self._shard(weights, x_ND, rotation, seqs, pages, None)
        tokens, sequences = PartitionSpec(TOKENS), PartitionSpec(self.split.sequences)
        run = jax.shard_map(
            self._shard,
            mesh=self.split.mesh,
            in_specs=(specs_of(self), tokens, sequences, sequences, self.state_spec, sequences),
            out_specs=(tokens, self.state_spec),
            check_vma=False,
        )
        return run(weights, x_ND, rotation, seqs, pages, move)

    def _shard(
        self,
        w: Weights,
        x_ND: Array,
        rotation: Rotation,
        seqs: Sequences,
        pages: LayerPages | None,
        move: Move | None,
    ) -> tuple[Array, LayerPages | None]:
        x_ND = self._gather(x_ND, w["o_proj"].dtype)
        x_ND = x_ND if move is None else x_ND[move.old_order.row_N]
        positions_RN = seqs.positions_RN
        with jax.named_scope("qkv"):
            q, k, v = self.project(w, x_ND.reshape(*positions_RN.shape, -1), rotation, positions_RN)
            if self.scale is not None:
                q = q * (self.scale * q.shape[-1] ** 0.5)  # kernels scale by its dimension
        sinks_H = w["sinks_H"].astype(jnp.float32) if "sinks_H" in w else None
        with jax.named_scope("attend"):
            if pages is None or seqs.table_BM is None:
                out = attend_uncached(q, k, k if v is None else v, positions_RN, self.span, sinks_H)
            else:
                out, pages = self._attend(seqs, q, k, v, pages, sinks_H)
        with jax.named_scope("out"):
            out = self.read_out(w, out).reshape(-1, w["o_proj"].shape[1])
            y_ND = self.kernels.multiply(out, w["o_proj"])
        y_ND = y_ND if move is None else y_ND[move.new_order.token_N]
        return self._scatter(y_ND) + bias_of(w, "o_bias", 2), pages

    def _attend(
        self, seqs: Sequences, q: Array, k: Array, v: Array | None, pages: LayerPages, sinks_H: Array | None
    ) -> tuple[Array, LayerPages]:
        """Attends over the cache; decode rows in the same step as prompts come before the prompts."""
        values = [None] * len(seqs.pieces) if v is None else seqs.cut(v)
        new = []
        for own, q_own, k_own, v_own in zip(seqs.pieces, seqs.cut(q), seqs.cut(k), values, strict=True):
            assert own.table_BM is not None
            new.append(NewTokens(q_own, k_own, v_own, own.positions_BT, own.table_BM))
        outs, pages = attend_all(self.kernels.attention, new, pages, self.span, sinks_H)
        return seqs.grid(outs), pages

    def _gather(self, x_ND: Array, dtype: jnp.dtype) -> Array:
        """Gathers the tokens of this rank's sequences from the ranks that share their heads and split their
        tokens.

        They are sent in the weights' dtype, to which the projections round them anyway.
        """
        if is_single(self.split.mesh) or EXPERT not in self.split.heads:
            return x_ND
        return lax.all_gather(x_ND.astype(dtype), EXPERT, tiled=True)

    def _scatter(self, y_ND: Array) -> Array:
        """Sums over the ranks among which the heads are split; returns this rank's tokens."""
        if is_single(self.split.mesh):
            return y_ND
        if EXPERT in self.split.heads:
            y_ND = lax.psum_scatter(y_ND, EXPERT, tiled=True)
        return lax.psum(y_ND, TENSOR)


def bias_of(w: Weights, name: str, ndim: int) -> Array | float:
    return jnp.expand_dims(w[name].astype(jnp.float32), tuple(range(ndim - 1))) if name in w else 0.0
