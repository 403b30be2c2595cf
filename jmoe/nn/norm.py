"""RMS normalisation in float32."""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float


def rms_norm(
    x: Float[Array, "*B D"],
    scale_D: Float[Array, " D"],
    eps: float,
    *,
    axis_name: tuple[str, ...] | None = None,
) -> Float[Array, "*B D"]:
    """``x / rms(x) * scale``; with ``axis_name`` the last axis is one shard's part of the normalised one."""
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    if axis_name is not None:
        mean_square = lax.pmean(mean_square, axis_name)
    scale = jnp.expand_dims(scale_D.astype(jnp.float32), tuple(range(x.ndim - 1)))
    return x * lax.rsqrt(mean_square + eps) * scale
