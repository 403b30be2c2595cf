"""Where every weight is declared: shape, dtype, initial value and the mesh axis of each dimension."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jmoe_kernels.grouped_mlp import storage_dtype

# of each dimension: the mesh axis, or axes, over which it is split
Axes = tuple[str | tuple[str, ...] | None, ...]
HOST = "pinned_host"  # the kind of host memory from which a device copies by itself


class ParamMaker:
    """Makes parameters of one dtype from one stream of random numbers, normal with deviation ``std``; zeros
    where that is 0, which are quickly described where only shapes are wanted.

    platform: that of the devices they will lie on; None is jax's default. A ``stored`` parameter is one
    that XLA:CPU must not see as bfloat16, because it slices single experts out of it in a loop: there it is
    kept as uint16 and reinterpreted where it is used.
    """

    def __init__(self, dtype: jnp.dtype, rngs: nnx.Rngs, std: float = 0.02, platform: str | None = None):
        self.dtype, self.rngs, self.std, self.platform = jnp.dtype(dtype), rngs, std, platform

    def _normal(self, shape: tuple[int, ...]) -> jax.Array:
        if self.std == 0:
            return jnp.zeros(shape, self.dtype)
        return (jax.random.normal(self.rngs.params(), shape, jnp.float32) * self.std).astype(self.dtype)

    def __call__(self, shape: tuple[int, ...], axes: Axes, keeps: bool = False) -> nnx.Param:
        """keeps: it is float32 where a checkpoint stores more than the model's dtype, as all vectors are.
        They take part in float32 arithmetic, and a rounded router would choose other experts."""
        return nnx.Param(self._normal(shape), axes=axes, keeps=keeps)

    def stored(self, shape: tuple[int, ...], axes: Axes, memory: str | None = None) -> nnx.Param:
        """memory: the kind it is to lie in, the device's own where None."""
        values = self._normal(shape).view(storage_dtype(self.dtype, self.platform))
        return nnx.Param(values, axes=axes, memory=memory)

    def ones(self, size: int, axes: Axes = (None,)) -> nnx.Param:
        return nnx.Param(jnp.ones((size,), self.dtype), axes=axes)

    def zeros(self, size: int, axes: Axes = (None,)) -> nnx.Param:
        return nnx.Param(jnp.zeros((size,), self.dtype), axes=axes)

    def exact(self, shape: tuple[int, ...], axes: Axes) -> nnx.Param:
        """A parameter that is float32 whatever the model's dtype."""
        return nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes)

    def numbers(self, size: int) -> nnx.Param:
        """0, 1, 2 ...: a parameter that no checkpoint of others has."""
        return nnx.Param(jnp.arange(size, dtype=jnp.int32), axes=(None,))


def specs_of(module: nnx.Module) -> dict[str, PartitionSpec]:
    """How each parameter of a module without parts is split, as it was declared."""
    return {name: PartitionSpec(*p.get_metadata("axes")) for name, p in nnx.state(module, nnx.Param).items()}
