"""Norm and rotation of queries and keys in one kernel, on the platforms that have one."""

from collections.abc import Callable

from jax import Array

from jmoe_kernels import cpu
from jmoe_kernels.backends import RotationKernel

# functions (x_BTHd, cos_BTh, sin_BTh, scale, eps) that norm, if there is a scale, and then rotate
IMPLEMENTATIONS: dict[RotationKernel, Callable[..., Array] | None] = {
    "xla": None,  # no kernel: the layers' own operations
    "cpu": cpu.rotate,
}
