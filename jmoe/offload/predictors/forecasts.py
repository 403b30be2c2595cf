"""Helpers that make a forecast for the batch from what is expected of single tokens."""

from typing import NamedTuple, Self

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from jmoe.offload.types import Forecast


def top(p_ZE: Float[Array, "*Z E"], k: int) -> Bool[Array, "*Z E"]:
    """Returns the k experts of highest p, of equals the lower id; it never takes an expert with p = 0."""
    _, ids_ZK = lax.top_k(p_ZE, min(k, p_ZE.shape[-1]))
    each_E = _with_rank(jnp.arange(p_ZE.shape[-1], dtype=ids_ZK.dtype), p_ZE.ndim + 1)
    return jnp.any(ids_ZK[..., None] == each_E, -2) & (p_ZE > 0)


def until(p_ZE: Float[Array, "*Z E"], mass_Z: Float[Array, "*Z"], k: int) -> Bool[Array, "*Z E"]:
    """Takes experts in descending p until they sum to ``mass_Z``, the expert that reaches it included, and
    never fewer than k (fMoE's selection, with the mass delta = 1 - similarity). Of equals the lower id comes
    first. It compares all pairs: for a hundred experts that takes a third of the time of a sort."""
    id_E = jnp.arange(p_ZE.shape[-1])
    earlier_EE = _with_rank(id_E[:, None] < id_E[None], p_ZE.ndim + 1)
    this_ZE1, other_Z1E = p_ZE[..., :, None], p_ZE[..., None, :]
    before_ZEE = (this_ZE1 > other_Z1E) | ((this_ZE1 == other_Z1E) & earlier_EE)
    mass_before_ZE = jnp.sum(jnp.where(before_ZEE, this_ZE1, 0), -2)
    rank_ZE = jnp.sum(before_ZEE, -2, dtype=jnp.int32)
    return (mass_before_ZE < jnp.expand_dims(mass_Z, -1)) | (rank_ZE < k)


def over_batch(
    p_BAE: Float[Array, "B A E"], wanted_BAE: Bool[Array, "B A E"], valid_B: Bool[Array, " B"]
) -> Forecast:
    """Combines the tokens' forecasts into one of the batch: an expert is wanted if any valid token wants it;
    its p is the highest of them.

    The paper leaves the combination open; union and maximum are ours. A token with a p that is not finite is
    left out for that layer; the other tokens count as they would without it.
    """
    usable_BA1 = valid_B[:, None, None] & jnp.all(jnp.isfinite(p_BAE), -1, keepdims=True)
    return Forecast(jnp.max(jnp.where(usable_BA1, p_BAE, 0), 0), jnp.any(wanted_BAE & usable_BA1, 0))


class FullForecast(NamedTuple):
    """A forecast of all L layers, made at once, with A empty rows after the last layer."""

    p_XE: Float[Array, "L+A E"]
    wanted_XE: Bool[Array, "L+A E"]

    @classmethod
    def make(cls, all_layers: Forecast, distance: int) -> Self:
        return cls(*(jnp.pad(each_LE, ((0, distance), (0, 0))) for each_LE in all_layers))

    def window(self, first_layer: int | Int[Array, ""], distance: int) -> Forecast:
        """Returns the forecast of layers ``first_layer .. first_layer + distance - 1``."""
        return Forecast(*(lax.dynamic_slice_in_dim(each_XE, first_layer, distance) for each_XE in self))


def _with_rank(a_X: Array, rank: int) -> Array:
    """Returns the array with axes of length 1 before its own, ``rank`` in all."""
    return a_X.reshape((1,) * (rank - a_X.ndim) + a_X.shape)
