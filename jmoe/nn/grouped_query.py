"""Grouped-query attention (arXiv 2305.13245), with the additions of model families: biases, norms of queries
and keys, clipping, sinks, layers that do not rotate."""

from collections.abc import Iterator

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int
from jmoe_kernels.rotation import IMPLEMENTATIONS as ROTATIONS

from jmoe.blueprint import Blueprint
from jmoe.config.model import ModelConfig
from jmoe.mesh import is_single
from jmoe.nn.attention import Attention, Weights, bias_of
from jmoe.nn.kv_cache import CachedHeads
from jmoe.nn.norm import rms_norm, unit_rms
from jmoe.nn.rope import Rotation, rotate
from jmoe.param import ParamMaker


class GroupedQueryAttention(Attention):
    """Grouped-query attention of one layer.

    sinks_H: one logit per head that takes part in its softmax and has no value (gpt-oss).
    """

    def __init__(self, blueprint: Blueprint, layer: int, make: ParamMaker):
        super().__init__(blueprint, layer, make)
        cfg, split = blueprint.cfg, blueprint.split
        d, head, heads = cfg.hidden_size, cfg.head_dim, split.heads
        q, kv = cfg.num_attention_heads * head, cfg.num_key_value_heads * head
        kv_axis = heads if cfg.num_key_value_heads >= split.head_ranks else None
        self.q_proj = make.product((q, d), (heads, None))
        self.k_proj = make.product((kv, d), (kv_axis, None))
        self.v_proj = make.product((kv, d), (kv_axis, None))
        self.o_proj = make.product((d, q), (None, heads))
        if cfg.attention_bias or cfg.qkv_bias:
            self.q_bias, self.k_bias = make((q,), (heads,)), make((kv,), (kv_axis,))
            self.v_bias = make((kv,), (kv_axis,))
        if cfg.attention_bias:
            self.o_bias = make((d,), (None,))
        if cfg.qk_norm == "head":
            self.q_norm, self.k_norm = make.ones(head), make.ones(head)
        elif cfg.qk_norm == "full":
            self.q_norm, self.k_norm = make.ones(q, (heads,)), make.ones(kv, (kv_axis,))
        if cfg.attention_sinks:
            self.sinks_H = make((cfg.num_attention_heads,), (heads,))
        self.scale = cfg.attention_multiplier

    @classmethod
    def rotary_dim(cls, cfg: ModelConfig) -> int:
        return cfg.head_dim

    @classmethod
    def query_dim(cls, cfg: ModelConfig) -> int:
        return cfg.head_dim

    @classmethod
    def cached_heads(cls, cfg: ModelConfig) -> CachedHeads:
        return CachedHeads(cfg.num_key_value_heads, cfg.head_dim)

    @classmethod
    def names(cls, cfg: ModelConfig) -> Iterator[tuple[str, str]]:
        for p in "qkvo":
            yield f"{p}_proj.weight", f"{p}_proj"
            if cfg.attention_bias or (cfg.qkv_bias and p != "o"):
                yield f"{p}_proj.bias", f"{p}_bias"
        if cfg.qk_norm in ("head", "full"):
            yield "q_norm.weight", "q_norm"
            yield "k_norm.weight", "k_norm"
        if cfg.attention_sinks:
            yield "sinks", "sinks_H"

    def project(
        self, w: Weights, x_BTD: Array, rotation: Rotation, positions_BT: Array
    ) -> tuple[Array, Array, Array | None]:
        cfg, (b, t, _), multiply = self.cfg, x_BTD.shape, self.kernels.multiply
        q, k, v = (multiply(x_BTD, w[f"{n}_proj"]) + bias_of(w, f"{n}_bias", 3) for n in "qkv")
        fused = ROTATIONS[self.kernels.rotation] if self._can_fuse_rotation() else None
        if fused is not None:  # norm and rotation in one kernel
            q, k, v = (a.reshape(b, t, -1, cfg.head_dim) for a in (q, k, v))
            q = fused(q, *rotation, w.get("q_norm"), cfg.rms_norm_eps)
            return q, fused(k, *rotation, w.get("k_norm"), cfg.rms_norm_eps), v
        if cfg.qk_norm == "full":
            over = None if is_single(self.split.mesh) else self.split.heads
            q = rms_norm(q, w["q_norm"], cfg.rms_norm_eps, axis_name=over)
            split_kv = cfg.num_key_value_heads >= self.split.head_ranks
            k = rms_norm(k, w["k_norm"], cfg.rms_norm_eps, axis_name=over if split_kv else None)
        if cfg.clip_qkv is not None:
            q, k, v = (jnp.clip(a, -cfg.clip_qkv, cfg.clip_qkv) for a in (q, k, v))
        q, k, v = (a.reshape(b, t, -1, cfg.head_dim) for a in (q, k, v))
        if cfg.qk_norm == "head":
            q, k = (rms_norm(a, w[n], cfg.rms_norm_eps) for a, n in ((q, "q_norm"), (k, "k_norm")))
        k, v = self._own_kv_head(k), self._own_kv_head(v)
        if not self.has_rotation:
            return self._tempered(q, positions_BT), k, v
        q, k = (rotate(a, rotation, interleaved=cfg.rope.interleaved) for a in (q, k))
        if cfg.qk_norm == "l2":
            q, k = unit_rms(q, cfg.rms_norm_eps), unit_rms(k, cfg.rms_norm_eps)
        return q, k, v

    def _can_fuse_rotation(self) -> bool:
        """Returns whether one kernel can norm and rotate the layer's queries and keys."""
        cfg = self.cfg
        whole = cfg.rope.partial_rotary_factor == 1 and not cfg.rope.interleaved and self.has_rotation
        known = whole and cfg.clip_qkv is None and cfg.qk_norm != "l2"
        return known and is_single(self.split.mesh)

    def _tempered(self, q_BTHd: Array, positions_BT: Int[Array, "B T"]) -> Float[Array, "B T H d"]:
        """Scales queries up with their position, so that long contexts do not blur (arXiv 2501.19399)."""
        cfg = self.cfg
        if not cfg.attn_scale:
            return q_BTHd
        steps_BT = jnp.floor((positions_BT.astype(jnp.float32) + 1.0) / cfg.floor_scale)
        return q_BTHd * (jnp.log1p(steps_BT) * cfg.attn_scale + 1.0)[:, :, None, None]

    def _own_kv_head(self, kv_BTHd: Array) -> Array:
        """Picks this rank's one KV head if the projection made all of them."""
        ranks, heads = self.split.head_ranks, self.cfg.num_key_value_heads
        if heads >= ranks:
            return kv_BTHd
        mine = lax.axis_index(self.split.heads) // (ranks // heads)
        return lax.dynamic_slice_in_dim(kv_BTHd, mine, 1, axis=2)
