"""The declaration of a weight: shape, dtype, initial value and the mesh axis of each dimension."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jmoe_kernels.grouped_mlp import storage_dtype
from jmoe_kernels.quantised import Quantised, Weight

# the mesh axis, or axes, over which each dimension is split
Axes = tuple[str | tuple[str, ...] | None, ...]
Products = Literal["experts", "dense"]  # what a weight is a factor of
HOST = "pinned_host"  # the kind of host memory that a device can copy from by itself


class ParamMaker:
    """Makes parameters of one dtype from one stream of normal random numbers.

    std: standard deviation; 0 makes zeros, which is fast if only shapes are needed.
    platform: platform of the devices that will hold the parameters; None is jax's default.

    ``in_storage_dtype`` makes a parameter that XLA:CPU must not see as bfloat16, because it slices single
    experts out of it in a loop: on a CPU it is kept as uint16 and reinterpreted when it is used.
    """

    def __init__(self, dtype: jnp.dtype, rngs: nnx.Rngs, std: float = 0.02, platform: str | None = None):
        self.dtype, self.rngs, self.std, self.platform = jnp.dtype(dtype), rngs, std, platform

    def _normal(self, shape: tuple[int, ...]) -> jax.Array:
        if self.std == 0:
            return jnp.zeros(shape, self.dtype)
        return (jax.random.normal(self.rngs.params(), shape, jnp.float32) * self.std).astype(self.dtype)

    def __call__(self, shape: tuple[int, ...], axes: Axes, has_own_dtype: bool = False) -> nnx.Param:
        """Makes a parameter of the maker's dtype.

        has_own_dtype: whether it stays float32 if a checkpoint stores it in more than the model's dtype, as
            all vectors do. Such parameters take part in float32 arithmetic, and a rounded router would choose
            other experts.
        """
        return nnx.Param(self._normal(shape), axes=axes, has_own_dtype=has_own_dtype)

    def product(self, shape: tuple[int, ...], axes: Axes) -> nnx.Param:
        """Makes a matrix, or a stack of matrices, that is only used in products, and may be quantised."""
        return nnx.Param(self._normal(shape), axes=axes, products="dense")

    def in_storage_dtype(self, shape: tuple[int, ...], axes: Axes, memory: str | None = None) -> nnx.Param:
        """Makes the experts' matrices in the storage dtype (see the class); they may be quantised.

        memory: kind of memory that holds it; None is the device's own.
        """
        values = self._normal(shape).view(storage_dtype(self.dtype, self.platform))
        return nnx.Param(values, axes=axes, memory=memory, products="experts")

    def ones(self, size: int, axes: Axes = (None,)) -> nnx.Param:
        return nnx.Param(jnp.ones((size,), self.dtype), axes=axes)

    def zeros(self, size: int, axes: Axes = (None,)) -> nnx.Param:
        return nnx.Param(jnp.zeros((size,), self.dtype), axes=axes)

    def float32(self, shape: tuple[int, ...], axes: Axes) -> nnx.Param:
        """Makes a parameter of zeros that is float32 for every dtype of the model."""
        return nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes)

    def numbers(self, size: int) -> nnx.Param:
        """Makes a parameter 0, 1, 2 ...; checkpoints that jmoe did not write do not have it."""
        return nnx.Param(jnp.arange(size, dtype=jnp.int32), axes=(None,))


def specs_of(module: nnx.Module) -> dict[str, PartitionSpec | Quantised]:
    """Returns the declared split of each parameter of a module that has no submodules."""
    params = nnx.state(module, nnx.Param).items()
    return {name: split(p.get_value(), PartitionSpec(*p.get_metadata("axes"))) for name, p in params}


def split(weight: Weight, axes: PartitionSpec) -> PartitionSpec | Quantised:
    """Returns how the arrays of a weight are split that is split by ``axes``."""
    return weight.split(axes) if isinstance(weight, Quantised) else axes
