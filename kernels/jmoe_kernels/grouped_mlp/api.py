"""``grouped_mlp``: one entry for every implementation; it raises if the named one cannot run."""

from collections.abc import Collection
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jmoe_kernels.backends import ExpertKernel, first_supported, get_backend, home_of
from jmoe_kernels.grouped_mlp.batched import grouped_mlp_batched
from jmoe_kernels.grouped_mlp.implementations import IMPLEMENTATIONS, Implementation
from jmoe_kernels.grouped_mlp.types import ExpertCodings, ExpertWeights
from jmoe_kernels.quantised import LAYOUTS, Coding
from jmoe_kernels.settings import Activation, Activations

PLAIN: ExpertCodings = (None, None)


def storage_dtype(dtype: jnp.dtype, platform: str | None = None) -> jnp.dtype:
    """Returns the dtype that stores a weight stack: uint16 for bfloat16 on a CPU, else ``dtype``.

    platform: platform of the devices; None is jax's default.
    """
    backend = get_backend(platform or jax.default_backend())
    return jnp.dtype(backend.bfloat16_storage if dtype == jnp.bfloat16 else dtype)


def why_not(implementation: str, platform: str, dtype: Any, *, interpret: bool = False) -> str | None:
    """Returns why ``implementation`` cannot run with weights of ``dtype`` on ``platform``, or None if it can.

    interpret: whether it would run in its interpreter, on any platform.

    An implementation may have limits on shapes too: see ``Implementation.limit``.
    """
    if implementation not in IMPLEMENTATIONS:
        return f"implementation {implementation!r} is unknown; known: {', '.join(IMPLEMENTATIONS)}"
    record = IMPLEMENTATIONS[implementation]
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"dtype {jnp.dtype(dtype).name} is not supported; bfloat16 and float32 are, by all of them"
    home = home_of(implementation) or platform
    if interpret and not record.has_interpreter:
        others = " and ".join(name for name, other in IMPLEMENTATIONS.items() if other.has_interpreter)
        return f"implementation {implementation!r} has no interpreter; {others} have"
    if home != platform and not interpret:
        return f"implementation {implementation!r} needs a {home}, this is a {platform}; 'xla' can run"
    reason = record.why_missing()
    return reason and f"implementation {implementation!r} cannot run here: {reason}; 'xla' can"


def pick(
    platform: str,
    dtype: Any,
    dims: tuple[int, int, int] | None = None,
    codings: Collection[ExpertCodings] = (PLAIN,),
) -> tuple[ExpertKernel, str]:
    """Returns the implementation that None stands for on ``platform``, and the reason.

    dims: (experts, inner, model) of the weights if they are known, because implementations may have limits.
    codings: how the layers' weights are stored, each way once.
    """

    def refusal(name: ExpertKernel) -> str | None:
        return why_not(name, platform, dtype) or (dims and why_not_weights(name, dims, dtype, codings))

    names = get_backend(platform).experts
    return first_supported(names, refusal, lambda name: IMPLEMENTATIONS[name].describe())


def why_not_weights(
    name: ExpertKernel, dims: tuple[int, int, int], dtype: Any, codings: Collection[ExpertCodings]
) -> str | None:
    """Returns why an implementation cannot take weights of these sizes and codings, or None if it can."""
    experts, inner, model = dims
    shapes = (experts, 2, inner, model), (experts, model, inner)
    for both in codings:
        weights = ExpertWeights(*(_abstract(name, *each, dtype) for each in zip(shapes, both, strict=True)))
        if reason := _limit(name, weights, 1, "silu"):
            return reason
    return None


def _abstract(name: ExpertKernel, shape: tuple[int, ...], coding: Coding | None, dtype: Any) -> Any:
    if coding is None:
        return jax.ShapeDtypeStruct(shape, dtype)
    layout = IMPLEMENTATIONS[name].layout_of(coding)
    fits = LAYOUTS[layout].fits(coding.code, shape)
    return coding.shapes(shape, jnp.dtype(dtype).name, layout if fits else "rows")


def _limit(name: ExpertKernel, weights: ExpertWeights, rows: int, activation: Activation) -> str | None:
    reason = IMPLEMENTATIONS[name].limit(weights, rows, activation)
    return reason and f"implementation {name!r}: {reason}; 'xla' can run"


def grouped_mlp(
    x_ND: Float[Array, "N D"],
    weights: ExpertWeights,
    group_sizes_E: Int[Array, " E"],
    *,
    activation: Activation = "silu",
    implementation: ExpertKernel | None = None,
    platform: str | None = None,
    max_rows: int | None = None,
    activations: Activations = "auto",
) -> Float[Array, "N D"]:
    """Computes the gated MLP of each row's expert in float32; ``x_ND`` is sorted by expert.

    group_sizes_E: number of rows of each expert, summing to at most N; rows past their sum come out zero.
    implementation: name of the implementation; None picks one (see ``pick``).
    platform: platform of the devices that it will run on; None is jax's default.
    max_rows: largest number of rows of an expert, for an implementation for training.
    activations: what the rows are rounded to by an implementation that multiplies with codes of weights.

    Every implementation can be differentiated, with the gradient of "batched".
    Raises ValueError with the reason if the named implementation cannot run.
    """
    platform = platform or jax.default_backend()
    name = implementation or pick(platform, weights.dtype, weights.dims)[0]
    reason = (
        why_not(name, platform, weights.dtype)
        or _mismatch(x_ND, weights, group_sizes_E, activation)
        or _limit(name, weights, x_ND.shape[0], activation)
    )
    if reason is None:
        reason = _why_no_max_rows(name, max_rows)
    if reason is not None:
        raise ValueError(f"grouped_mlp: {reason}")
    record = IMPLEMENTATIONS[name]
    if record.is_for_training:
        return record.run(x_ND, weights, group_sizes_E, activation, max_rows=max_rows)
    return _forward(record, (activation, activations), x_ND, weights, group_sizes_E)


def _why_no_max_rows(name: ExpertKernel, max_rows: int | None) -> str | None:
    if max_rows is None or IMPLEMENTATIONS[name].is_for_training:
        return None
    others = " and ".join(repr(name) for name, other in IMPLEMENTATIONS.items() if other.is_for_training)
    return f"max_rows is for implementation {others}, not {name!r}"


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
    record: Implementation,
    settings: tuple[Activation, Activations],
    x_ND: Array,
    weights: ExpertWeights,
    group_sizes_E: Array,
) -> Array:
    if record.rows_dtype is not None:
        x_ND = x_ND.astype(record.rows_dtype)
    more = {"activations": settings[1]} if record.why_unrounded is not None else {}
    return record.run(x_ND, weights, group_sizes_E, activation=settings[0], **more)


def _forward_with_residuals(*args: Any) -> tuple[Array, tuple]:
    return _forward(*args), args[2:]


def _backward(
    record: Implementation, settings: tuple[Activation, Activations], residuals: tuple, g_ND: Array
) -> tuple:
    x_ND, weights, group_sizes_E = residuals
    _, pull = jax.vjp(lambda x, w: grouped_mlp_batched(x, w, group_sizes_E, settings[0]), x_ND, weights)
    return (*pull(g_ND), None)


_forward.defvjp(_forward_with_residuals, _backward)
