"""Where every weight is declared: shape, dtype, initial value and the mesh axis of each dimension."""

import jax
import jax.numpy as jnp
from flax import nnx
from jmoe_kernels.grouped_mlp import storage_dtype


class ParamMaker:
    """Makes parameters of one dtype from one stream of random numbers, normal with deviation ``std``.

    A ``stored`` parameter is one that XLA:CPU must not see as bfloat16, because it slices single experts
    out of it in a loop: there it is kept as uint16 and reinterpreted where it is used.
    """

    def __init__(self, dtype: jnp.dtype, rngs: nnx.Rngs, std: float = 0.02):
        self.dtype, self.rngs, self.std = jnp.dtype(dtype), rngs, std

    def _normal(self, shape: tuple[int, ...]) -> jax.Array:
        return (jax.random.normal(self.rngs.params(), shape, jnp.float32) * self.std).astype(self.dtype)

    def __call__(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
        return nnx.Param(self._normal(shape), axes=axes)

    def stored(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
        return nnx.Param(self._normal(shape).view(storage_dtype(self.dtype)), axes=axes)

    def ones(self, size: int, axes: tuple[str | None, ...] = (None,)) -> nnx.Param:
        return nnx.Param(jnp.ones((size,), self.dtype), axes=axes)
