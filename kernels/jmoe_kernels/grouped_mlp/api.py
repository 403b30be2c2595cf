"""``grouped_mlp``: one entry for every implementation; a named one raises where it cannot run."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jmoe_kernels.grouped_mlp.batched import grouped_mlp_batched
from jmoe_kernels.grouped_mlp.reference import grouped_mlp_reference
from jmoe_kernels.grouped_mlp.xla import grouped_mlp_xla

Implementation = Literal["xla", "batched", "reference"]


def storage_dtype(dtype: jnp.dtype, platform: str | None = None) -> jnp.dtype:
    """The dtype in which a weight stack of ``dtype`` is kept: uint16 for bfloat16 on CPU, else ``dtype``."""
    platform = platform or jax.default_backend()
    return jnp.dtype(jnp.uint16) if platform == "cpu" and dtype == jnp.bfloat16 else jnp.dtype(dtype)


def supports(implementation: str, shape: tuple[int, ...], group_sizes: Array) -> str | None:
    """Why ``implementation`` cannot run on weights of ``shape`` = (E, 2, F, D), or None if it can."""
    if implementation not in get_args(Implementation):
        return f"implementation {implementation!r} is unknown; known: {', '.join(get_args(Implementation))}"
    if len(shape) != 4 or shape[1] != 2:
        return f"gate_up must be [experts, 2, inner, model], got {list(shape)}"
    if group_sizes.shape != (shape[0],):
        return f"group_sizes must be [{shape[0]}], got {list(group_sizes.shape)}"
    return None


def grouped_mlp(
    x_ND: Float[Array, "N D"],
    gate_up_E2FD: Float[Array, "E 2 F D"],
    down_EDF: Float[Array, "E D F"],
    group_sizes_E: Int[Array, " E"],
    *,
    implementation: Implementation | None = None,
    capacity: int | None = None,
) -> Float[Array, "N D"]:
    """SwiGLU MLP of each row's expert, float32 out; ``x_ND`` is sorted by expert.

    group_sizes_E: rows of each expert, summing to at most N; rows past their sum come out zero.
    implementation: None picks "xla"; "batched" is the differentiable one and alone takes ``capacity``.
    Raises ValueError with the reason where a named implementation cannot run.
    """
    name = implementation or "xla"
    reason = supports(name, gate_up_E2FD.shape, group_sizes_E)
    if reason is None and capacity is not None and name != "batched":
        reason = f"capacity is for implementation 'batched', not {name!r}"
    if reason is not None:
        raise ValueError(f"grouped_mlp: {reason}")
    if name == "batched":
        return grouped_mlp_batched(x_ND, gate_up_E2FD, down_EDF, group_sizes_E, capacity=capacity)
    run = {"xla": grouped_mlp_xla, "reference": grouped_mlp_reference}[name]
    return run(x_ND, gate_up_E2FD, down_EDF, group_sizes_E)
