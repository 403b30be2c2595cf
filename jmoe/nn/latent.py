"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1.2), in its absorbed form.

The cache holds one row per token for all heads: the normed latent, from which each head's keys and values
could be made, and the rotated key that all heads share. The keys and values are never made. Instead, a head's
query is projected into the latent space, and the weighted sum of latents is projected back to the head's
values: ``q (W_k c) = (W_k^T q) c``. To the kernels this is attention with one KV head whose key is its own
value.
"""

from collections.abc import Iterator

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float
from jmoe_kernels.backends import get_backend
from jmoe_kernels.matmul import dot

from jmoe.blueprint import Blueprint
from jmoe.config.model import ModelConfig
from jmoe.nn.attention import Attention, Weights, bias_of
from jmoe.nn.kv_cache import CachedHeads
from jmoe.nn.norm import rms_norm
from jmoe.nn.rope import Rotation, rotate
from jmoe.param import ParamMaker

EPS = 1e-6  # of the norms of latents, independent of the model's rms_norm_eps


class LatentAttention(Attention):
    """Latent attention of one layer. Every rank caches the whole row of a token.

    q_proj: projection to queries that are not compressed.
    q_a_proj, q_norm, q_b_proj: projections and norm that make compressed queries.
    kv_a_proj: projection to the latent and the shared key.
    kv_b_proj: projection from the latent to each head's keys and values.
    """

    def __init__(self, blueprint: Blueprint, layer: int, make: ParamMaker):
        super().__init__(blueprint, layer, make)
        cfg, split = blueprint.cfg, blueprint.split
        assert cfg.latent is not None
        self.latent = size = cfg.latent
        d, count, heads = cfg.hidden_size, cfg.num_attention_heads, split.heads
        if size.q_lora_rank is None:
            self.q_proj = make.product((count * size.qk_head_dim, d), (heads, None))
        else:
            self.q_a_proj, self.q_norm = (
                make.product((size.q_lora_rank, d), (None, None)),
                make.ones(size.q_lora_rank),
            )
            self.q_b_proj = make.product((count * size.qk_head_dim, size.q_lora_rank), (heads, None))
        self.kv_a_proj = make.product((size.cached_dim, d), (None, None))
        self.kv_norm = make.ones(size.kv_lora_rank)
        both = count * (size.qk_nope_head_dim + size.v_head_dim)
        self.kv_b_proj = make((both, size.kv_lora_rank), (heads, None))
        self.o_proj = make.product((d, count * size.v_head_dim), (None, heads))
        if cfg.attention_bias:
            if size.q_lora_rank is not None:
                self.q_a_bias = make((size.q_lora_rank,), (None,))
            self.kv_a_bias, self.o_bias = make((size.cached_dim,), (None,)), make((d,), (None,))
        plain = size.qk_head_dim**-0.5
        self.scale = plain if cfg.attention_multiplier is None else cfg.attention_multiplier

    @classmethod
    def rotary_dim(cls, cfg: ModelConfig) -> int:
        assert cfg.latent is not None
        return cfg.latent.qk_rope_head_dim

    @classmethod
    def query_dim(cls, cfg: ModelConfig) -> int:
        assert cfg.latent is not None
        return cfg.latent.qk_head_dim

    @classmethod
    def cached_heads(cls, cfg: ModelConfig) -> CachedHeads:
        assert cfg.latent is not None
        return CachedHeads(1, cfg.latent.cached_dim, cfg.latent.kv_lora_rank)

    @classmethod
    def names(cls, cfg: ModelConfig) -> Iterator[tuple[str, str]]:
        assert cfg.latent is not None
        biased = {"o_proj": "o", "kv_a_proj_with_mqa": "kv_a"}
        table = {"kv_a_proj_with_mqa": "kv_a_proj", "kv_b_proj": "kv_b_proj", "o_proj": "o_proj"}
        if cfg.latent.q_lora_rank is None:
            table["q_proj"] = "q_proj"
        else:
            biased["q_a_proj"] = "q_a"
            table |= {"q_a_proj": "q_a_proj", "q_b_proj": "q_b_proj", "q_a_layernorm": "q_norm"}
        for name, path in (table | {"kv_a_layernorm": "kv_norm"}).items():
            yield f"{name}.weight", path
            if cfg.attention_bias and name in biased:
                yield f"{name}.bias", f"{biased[name]}_bias"

    def project(
        self, w: Weights, x_BTD: Array, rotation: Rotation, positions_BT: Array
    ) -> tuple[Array, Array, Array | None]:
        size, (b, t, _) = self.latent, x_BTD.shape
        interleaved = self.cfg.rope.interleaved
        q = self._queries(w, x_BTD).reshape(b, t, -1, size.qk_head_dim)
        q_nope, q_rope = q[..., : size.qk_nope_head_dim], q[..., size.qk_nope_head_dim :]
        kv = self.kernels.multiply(x_BTD, w["kv_a_proj"]) + bias_of(w, "kv_a_bias", 3)
        latent_BTl = rms_norm(kv[..., : size.kv_lora_rank], w["kv_norm"], EPS)
        k_rope = rotate(kv[:, :, None, size.kv_lora_rank :], rotation, interleaved=interleaved)
        absorbed = dot("bthn,hnl->bthl", q_nope, self._split_heads(w)[:, : size.qk_nope_head_dim])
        q = jnp.concatenate([absorbed, rotate(q_rope, rotation, interleaved=interleaved)], axis=-1)
        return q, jnp.concatenate([latent_BTl[:, :, None], k_rope], axis=-1), None

    def read_out(self, w: Weights, out_BTHd: Array) -> Float[Array, "B T H v"]:
        latents = out_BTHd[..., : self.latent.kv_lora_rank]
        return dot("bthl,hvl->bthv", latents, self._split_heads(w)[:, self.latent.qk_nope_head_dim :])

    def _queries(self, w: Weights, x_BTD: Array) -> Float[Array, "B T Hd"]:
        multiply = self.kernels.multiply
        if self.latent.q_lora_rank is None:
            return multiply(x_BTD, w["q_proj"])
        compressed = multiply(x_BTD, w["q_a_proj"]) + bias_of(w, "q_a_bias", 3)
        return multiply(rms_norm(compressed, w["q_norm"], EPS), w["q_b_proj"])

    def _split_heads(self, w: Weights) -> Float[Array, "H n+v l"]:
        size = self.latent
        heads = w["kv_b_proj"].reshape(-1, size.qk_nope_head_dim + size.v_head_dim, size.kv_lora_rank)
        has_product = get_backend(self.kernels.platform).has_batched_bfloat16
        return heads if has_product else heads.astype(jnp.float32)
