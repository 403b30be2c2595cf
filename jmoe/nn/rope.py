"""Rotary position embedding and its extensions to long contexts.

The first half of the rotated dimensions is paired with the second half, as Hugging Face lays heads out. In an
``interleaved`` layout neighbours are pairs; here they are moved into the two halves first. Queries and keys
are permuted alike, so that their products do not change.
Sources: RoPE (arXiv 2104.09864), YaRN (2309.00071), LongRoPE (2402.13753), Llama 3.1's frequencies.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jmoe.config.parts import RopeConfig

Rotation = tuple[Array, Array]
Rotations = dict[int, Rotation]  # by a head's dimension, which kinds of attention may have of their own


def rotation(positions_BT: Int[Array, "B T"], dim: int, rope: RopeConfig) -> Rotation:
    """Returns the cos and sin of each position's angles, both ``[B, T, rotated dimensions / 2]`` float32."""
    inv_freq, scale = frequencies(dim, rope)
    angle = positions_BT.astype(jnp.float32)[..., None] * inv_freq[None, None]
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def rotate(x_BTHd: Float[Array, "B T H d"], angles: Rotation, *, interleaved: bool = False) -> Array:
    """Rotates the heads by their positions' angles; dimensions after the rotated ones do not change."""
    cos, sin = (part[:, :, None] for part in angles)
    turned = 2 * cos.shape[-1]
    x, rest = x_BTHd[..., :turned], x_BTHd[..., turned:]
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def frequencies(dim: int, rope: RopeConfig) -> tuple[Float[np.ndarray, " H"], float]:
    """Returns the radians per position of each pair of a head's ``dim`` dimensions, and the factor of cos and
    sin."""
    rotated = int(dim * rope.partial_rotary_factor)
    base_freq = (1.0 / rope.rope_theta ** (np.arange(0, rotated, 2, dtype=np.float32) / rotated)).astype(
        np.float32
    )
    match rope.rope_type:
        case "default":
            return base_freq, 1.0
        case "linear":
            return base_freq / np.float32(rope.factor), 1.0
        case "yarn":
            return _yarn(base_freq, rotated, rope)
        case "longrope":
            return _longrope(base_freq, rope)
        case "llama3":
            return _llama3(base_freq, rope), 1.0


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Returns how much attention is sharpened for contexts ``factor`` times as long (YaRN, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn(base_freq: np.ndarray, rotated: int, rope: RopeConfig) -> tuple[np.ndarray, float]:
    """Keeps fast pairs, slows slow pairs down by ``factor``, with a ramp between them (YaRN, section 3.2)."""
    factor, original = rope.factor, rope.original_max_position_embeddings
    assert factor is not None and original is not None

    def pair_with(turns: float) -> float:
        """Returns the pair that makes ``turns`` full turns within the original context."""
        return rotated * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    high = high + 0.001 if low == high else high
    slow = np.clip((np.arange(rotated // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    inv_freq = (base_freq / factor) * slow + base_freq * (1 - slow)
    scale = rope.attention_factor
    if scale is None and rope.mscale and rope.mscale_all_dim:
        scale = yarn_mscale(factor, rope.mscale) / yarn_mscale(factor, rope.mscale_all_dim)
    return inv_freq.astype(np.float32), yarn_mscale(factor) if scale is None else scale


def _longrope(base_freq: np.ndarray, rope: RopeConfig) -> tuple[np.ndarray, float]:
    """Slows each pair down by its own factor, from one of two lists, by the length of contexts served."""
    factors, scale = (
        (rope.long_factor, rope.long_mscale) if rope.long else (rope.short_factor, rope.short_mscale)
    )
    if scale is None:
        factor, original = rope.factor or 1.0, rope.original_max_position_embeddings
        assert original is not None
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        scale = scale if rope.attention_factor is None else rope.attention_factor
    return (base_freq / np.asarray(factors, np.float32)).astype(np.float32), scale


def _llama3(base_freq: np.ndarray, rope: RopeConfig) -> np.ndarray:
    """Makes wavelengths beyond the original context ``factor`` times longer, keeps short ones, and blends
    between them."""
    factor, original = rope.factor, rope.original_max_position_embeddings
    assert factor is not None and original is not None
    turns = original * base_freq / (2 * np.float32(np.pi))  # within the original context
    low, high = rope.low_freq_factor, rope.high_freq_factor
    blend = np.clip((turns - low) / (high - low), 0, 1) if high > low else turns > low
    return ((1 - blend) * base_freq / factor + blend * base_freq).astype(np.float32)
