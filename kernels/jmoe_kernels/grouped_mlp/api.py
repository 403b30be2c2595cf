"""``grouped_mlp``: one entry for every implementation; it raises if the named one cannot run."""

from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jmoe_kernels import cpu
from jmoe_kernels.backends import ExpertKernel as Implementation
from jmoe_kernels.backends import first_supported, get_backend, home_of
from jmoe_kernels.grouped_mlp.batched import grouped_mlp_batched
from jmoe_kernels.grouped_mlp.cpu import combined_mlp_cpu, grouped_mlp_cpu
from jmoe_kernels.grouped_mlp.reference import grouped_mlp_reference
from jmoe_kernels.grouped_mlp.types import Activation, ExpertWeights
from jmoe_kernels.grouped_mlp.xla import grouped_mlp_xla

PALLAS = ("pallas_tpu", "pallas_gpu")  # they have an interpreter and limits on shapes
COMBINED = {"cpu": combined_mlp_cpu}  # these also gather tokens and combine their outputs


def _pallas(name: str) -> ModuleType:
    """Returns the module of a Pallas implementation.

    It is imported when it is needed, which saves a quarter of a second on a CPU.
    """
    return import_module(f"jmoe_kernels.grouped_mlp.{name}")


def storage_dtype(dtype: jnp.dtype, platform: str | None = None) -> jnp.dtype:
    """Returns the dtype that stores a weight stack: uint16 for bfloat16 on a CPU, else ``dtype``.

    platform: platform of the devices; None is jax's default.
    """
    backend = get_backend(platform or jax.default_backend())
    return jnp.dtype(backend.bfloat16_storage if dtype == jnp.bfloat16 else dtype)


def supports(implementation: str, platform: str, dtype: Any, *, interpret: bool = False) -> str | None:
    """Returns why ``implementation`` cannot run with weights of ``dtype`` on ``platform``, or None if it can.

    interpret: whether it would run in its interpreter, on any platform.

    Each implementation has limits on shapes of its own: see ``supports`` of ``pallas_tpu`` and
    ``pallas_gpu``.
    """
    if implementation not in get_args(Implementation):
        return f"implementation {implementation!r} is unknown; known: {', '.join(get_args(Implementation))}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"dtype {jnp.dtype(dtype).name} is not supported; bfloat16 and float32 are, by all of them"
    home = home_of(implementation) or platform
    if interpret and implementation not in PALLAS:
        return f"implementation {implementation!r} has no interpreter; pallas_tpu and pallas_gpu have"
    if home != platform and not interpret:
        return f"implementation {implementation!r} needs a {home}, this is a {platform}; 'xla' can run"
    if implementation == "cpu" and isinstance(library := cpu.get_library(), str):
        return f"implementation 'cpu' cannot run here: {library}; 'xla' can"
    return None


def pick(platform: str, dtype: Any, dims: tuple[int, int, int] | None = None) -> tuple[Implementation, str]:
    """Returns the implementation that None stands for on ``platform``, and the reason.

    dims: (experts, inner, model) of the weights if they are known, because the Pallas kernels have limits.
    """

    def lacks(name: Implementation) -> str | None:
        reason = supports(name, platform, dtype)
        if reason is None and dims is not None:
            reason = _shape_limit(name, _abstract_weights(dims, dtype), 1, "silu")
        return reason

    return first_supported(get_backend(platform).experts, lacks, partial(_praise, platform))


def _praise(platform: str, name: Implementation) -> str:
    if name in PALLAS:
        return f"the Pallas kernels for {platform}"
    library = cpu.get_library()
    assert isinstance(library, cpu.Library)
    return f"C++ kernels for {library.isa}"


def _abstract_weights(dims: tuple[int, int, int], dtype: Any) -> ExpertWeights:
    experts, inner, model = dims
    shapes = (experts, 2, inner, model), (experts, model, inner)
    return ExpertWeights(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes))  # pyright: ignore[reportArgumentType]


def _shape_limit(name: str, weights: ExpertWeights, rows: int, activation: Activation) -> str | None:
    if name not in PALLAS:
        return None
    reason = _pallas(name).supports(weights, rows, activation)
    return reason and f"implementation {name!r}: {reason}; 'xla' can run"


def grouped_mlp(
    x_ND: Float[Array, "N D"],
    weights: ExpertWeights,
    group_sizes_E: Int[Array, " E"],
    *,
    activation: Activation = "silu",
    implementation: Implementation | None = None,
    platform: str | None = None,
    capacity: int | None = None,
) -> Float[Array, "N D"]:
    """Computes the gated MLP of each row's expert in float32; ``x_ND`` is sorted by expert.

    group_sizes_E: number of rows of each expert, summing to at most N; rows past their sum come out zero.
    implementation: name of the implementation; None picks one (see ``pick``).
    platform: platform of the devices that it will run on; None is jax's default.
    capacity: largest number of rows of an expert, for "batched" alone.

    Every implementation can be differentiated, with the gradient of "batched".
    Raises ValueError with the reason if the named implementation cannot run.
    """
    platform = platform or jax.default_backend()
    name = implementation or pick(platform, weights.dtype, weights.dims)[0]
    reason = (
        supports(name, platform, weights.dtype)
        or _mismatch(x_ND, weights, group_sizes_E, activation)
        or _shape_limit(name, weights, x_ND.shape[0], activation)
    )
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
    for name, actual, expected in (
        ("x", x_ND.shape, (x_ND.shape[0], model)),
        ("down", weights.down_EDF.shape, (experts, model, inner)),
        ("group_sizes", group_sizes_E.shape, (experts,)),
        ("gate_up_bias", getattr(weights.gate_up_bias_E2F, "shape", None), (experts, 2, inner)),
        ("down_bias", getattr(weights.down_bias_ED, "shape", None), (experts, model)),
    ):
        if actual is not None and actual != expected:
            return f"{name} must be {list(expected)}, got {list(actual)}"
    return None


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _forward(
    name: Implementation,
    activation: Activation,
    x_ND: Array,
    weights: ExpertWeights,
    group_sizes_E: Array,
) -> Array:
    if name == "pallas_tpu":
        run = _pallas(name).grouped_mlp_pallas_tpu
    elif name == "pallas_gpu":
        run = _pallas(name).grouped_mlp_pallas_gpu
        x_ND = x_ND.astype(jnp.bfloat16)
    else:
        run = {"xla": grouped_mlp_xla, "reference": grouped_mlp_reference, "cpu": grouped_mlp_cpu}[name]
    return run(x_ND, weights, group_sizes_E, activation=activation)


def _forward_with_residuals(*args: Any) -> tuple[Array, tuple]:
    return _forward(*args), args[2:]


def _backward(name: Implementation, activation: Activation, residuals: tuple, g_ND: Array) -> tuple:
    x_ND, weights, group_sizes_E = residuals
    _, pull = jax.vjp(lambda x, w: grouped_mlp_batched(x, w, group_sizes_E, activation), x_ND, weights)
    return (*pull(g_ND), None)


_forward.defvjp(_forward_with_residuals, _backward)
