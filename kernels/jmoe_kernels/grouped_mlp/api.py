"""``grouped_mlp``: one entry for every implementation; a named one raises where it cannot run."""

from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jmoe_kernels import cpu
from jmoe_kernels.grouped_mlp.batched import grouped_mlp_batched
from jmoe_kernels.grouped_mlp.cpu import grouped_mlp_cpu
from jmoe_kernels.grouped_mlp.reference import grouped_mlp_reference
from jmoe_kernels.grouped_mlp.types import Activation, ExpertWeights
from jmoe_kernels.grouped_mlp.xla import grouped_mlp_xla

Implementation = Literal["xla", "cpu", "batched", "reference"]


def storage_dtype(dtype: jnp.dtype, platform: str | None = None) -> jnp.dtype:
    """The dtype in which a weight stack of ``dtype`` is kept: uint16 for bfloat16 on CPU, else ``dtype``."""
    platform = platform or jax.default_backend()
    return jnp.dtype(jnp.uint16) if platform == "cpu" and dtype == jnp.bfloat16 else jnp.dtype(dtype)


def supports(implementation: str, platform: str, dtype: Any) -> str | None:
    """Why ``implementation`` cannot run on ``platform`` with weights of ``dtype``, or None if it can."""
    if implementation not in get_args(Implementation):
        return f"implementation {implementation!r} is unknown; known: {', '.join(get_args(Implementation))}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"dtype {jnp.dtype(dtype).name} is not supported; bfloat16 and float32 are, by all of them"
    if implementation == "cpu":
        if platform != "cpu":
            return f"implementation 'cpu' cannot run on {platform}; 'xla' can"
        if isinstance(library := cpu.library(), str):
            return f"implementation 'cpu' cannot run here: {library}; 'xla' can"
    return None


def pick(platform: str, dtype: Any) -> tuple[Implementation, str]:
    """The implementation that None stands for on ``platform``, and why."""
    reason = supports("cpu", platform, dtype)
    if reason is None:
        library = cpu.library()
        assert isinstance(library, cpu.Library)
        return "cpu", f"C++ kernels for {library.isa}"
    return "xla", "portable XLA: " + reason


def grouped_mlp(
    x_ND: Float[Array, "N D"],
    weights: ExpertWeights,
    group_sizes_E: Int[Array, " E"],
    *,
    activation: Activation = "silu",
    implementation: Implementation | None = None,
    capacity: int | None = None,
) -> Float[Array, "N D"]:
    """Gated MLP of each row's expert, float32 out; ``x_ND`` is sorted by expert.

    group_sizes_E: rows of each expert, summing to at most N; rows past their sum come out zero.
    implementation: None picks (see ``pick``). capacity: for "batched" alone, rows an expert at most.
    Every implementation can be differentiated, with the gradient of "batched".
    Raises ValueError with the reason where a named implementation cannot run.
    """
    platform = jax.default_backend()
    name = implementation or pick(platform, weights.dtype)[0]
    reason = supports(name, platform, weights.dtype) or _mismatch(x_ND, weights, group_sizes_E, activation)
    if reason is None and capacity is not None and name != "batched":
        reason = f"capacity is for implementation 'batched', not {name!r}"
    if reason is not None:
        raise ValueError(f"grouped_mlp: {reason}")
    if name == "batched":
        return grouped_mlp_batched(x_ND, weights, group_sizes_E, activation, capacity=capacity)
    return _forward(name, activation, x_ND, weights, group_sizes_E)


def _mismatch(x_ND: Array, weights: ExpertWeights, group_sizes_E: Array, activation: str) -> str | None:
    shape = weights.gate_up_E2FD.shape
    if len(shape) != 4 or shape[1] != 2:
        return f"gate_up must be [experts, 2, inner, model], got {list(shape)}"
    experts, inner, model = weights.dims
    if activation not in get_args(Activation):
        return f"activation {activation!r} is unknown; known: {', '.join(get_args(Activation))}"
    for name, got, want in (
        ("x", x_ND.shape, (x_ND.shape[0], model)),
        ("down", weights.down_EDF.shape, (experts, model, inner)),
        ("group_sizes", group_sizes_E.shape, (experts,)),
        ("gate_up_bias", getattr(weights.gate_up_bias_E2F, "shape", None), (experts, 2, inner)),
        ("down_bias", getattr(weights.down_bias_ED, "shape", None), (experts, model)),
    ):
        if got is not None and got != want:
            return f"{name} must be {list(want)}, got {list(got)}"
    return None


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _forward(
    name: Implementation, activation: Activation, x_ND: Array, weights: ExpertWeights, group_sizes_E: Array
) -> Array:
    run = {"xla": grouped_mlp_xla, "reference": grouped_mlp_reference, "cpu": grouped_mlp_cpu}[name]
    return run(x_ND, weights, group_sizes_E, activation)


def _forward_saved(name: Implementation, activation: Activation, *args: Any) -> tuple[Array, tuple]:
    return _forward(name, activation, *args), args


def _backward(name: Implementation, activation: Activation, saved: tuple, g_ND: Array) -> tuple:
    x_ND, weights, group_sizes_E = saved
    _, pull = jax.vjp(lambda x, w: grouped_mlp_batched(x, w, group_sizes_E, activation), x_ND, weights)
    return (*pull(g_ND), None)


_forward.defvjp(_forward_saved, _backward)
