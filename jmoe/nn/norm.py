"""Normalisation in float32: by the root mean square, or by mean and deviation."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Float

from jmoe.config.model import ModelConfig
from jmoe.param import ParamMaker


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NormWeights:
    """The weights of a norm.

    bias_D: bias of a layer norm; None means an RMS norm.
    """

    scale_D: Float[Array, " D"]
    bias_D: Float[Array, " D"] | None = None


class Norm(nnx.Module):
    """The weights of the family's kind of norm over the model dimension."""

    def __init__(self, cfg: ModelConfig, make: ParamMaker):
        self.scale_D = make.ones(cfg.hidden_size)
        self.bias_D = make.zeros(cfg.hidden_size) if cfg.norm == "layer" else None

    @property
    def weights(self) -> NormWeights:
        return NormWeights(self.scale_D[...], None if self.bias_D is None else self.bias_D[...])


def normalize(x: Float[Array, "*B D"], weights: NormWeights, eps: float) -> Float[Array, "*B D"]:
    if weights.bias_D is None:
        return rms_norm(x, weights.scale_D, eps)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return rms_norm(centred, weights.scale_D, eps) + _along_last(weights.bias_D, x.ndim)


def rms_norm(
    x: Float[Array, "*B D"],
    scale_D: Float[Array, " D"],
    eps: float,
    *,
    axis_name: tuple[str, ...] | None = None,
) -> Float[Array, "*B D"]:
    """Returns ``x / rms(x) * scale``; with ``axis_name``, ``x`` holds one shard's part of the normalised
    axis."""
    return unit_rms(x, eps, axis_name=axis_name) * _along_last(scale_D, x.ndim)


def unit_rms(
    x: Float[Array, "*B D"], eps: float, *, axis_name: tuple[str, ...] | None = None
) -> Float[Array, "*B D"]:
    """Returns ``x / rms(x)``."""
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    if axis_name is not None:
        mean_square = lax.pmean(mean_square, axis_name)
    return x * lax.rsqrt(mean_square + eps)


def _along_last(weights_D: Array, ndim: int) -> Array:
    return jnp.expand_dims(weights_D.astype(jnp.float32), tuple(range(ndim - 1)))
