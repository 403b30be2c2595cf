"""Rotary position embedding, the half-rotation form that Hugging Face checkpoints use."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

Rotation = tuple[Array, Array]


def rotation(positions_BT: Int[Array, "B T"], head_dim: int, theta: float) -> Rotation:
    """(cos, sin) of every position's angles, each ``[B, T, head_dim / 2]`` float32."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions_BT.astype(jnp.float32)[..., None] * frequency[None, None]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTHd: Float[Array, "B T H d"], by: Rotation) -> Float[Array, "B T H d"]:
    cos, sin = (part[:, :, None] for part in by)
    a, b = jnp.split(x_BTHd, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
