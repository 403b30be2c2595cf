"""Grouped MLP by the C++ kernel (``cpu/src/grouped_mlp.cc``), which also gathers and combines tokens."""

from typing import get_args

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jmoe_kernels import cpu
from jmoe_kernels.grouped_mlp.types import ExpertWeights
from jmoe_kernels.quantised import as_float
from jmoe_kernels.settings import Activation, Activations

ACTIVATIONS = get_args(Activation)  # the kernel knows them by their index


def grouped_mlp_cpu(
    x_ND: Float[Array, "N D"],
    weights: ExpertWeights,
    group_sizes_E: Int[Array, " E"],
    activation: Activation = "silu",
    activations: Activations = "auto",
) -> Float[Array, "N D"]:
    """Computes ``down(act(gate x) * up x)`` of rows sorted by expert; rows past the last group are zero.

    activations: what the rows are rounded to for quantised weights.
    """
    return _call(
        "jmoe_grouped_mlp", x_ND, weights, (group_sizes_E.astype(jnp.int32),), activation, activations
    )


def combined_mlp_cpu(
    x_TD: Float[Array, "T D"],
    combine_TK: Float[Array, "T K"],
    order_N: Int[Array, " N"],
    weights: ExpertWeights,
    group_sizes_E: Int[Array, " E"],
    activation: Activation = "silu",
    activations: Activations = "auto",
) -> Float[Array, "T D"]:
    """Returns each token's sum of its experts' outputs times ``combine_TK``.

    order_N: assignment ``t * K + k`` of each row in the order by expert; those past the last group are
        unused.
    activations: what the rows are rounded to for quantised weights.
    """
    args = (group_sizes_E, order_N, combine_TK)
    return _call("jmoe_combined_mlp", x_TD, weights, args, activation, activations)


def limit(weights: ExpertWeights, rows: int, activation: str) -> str | None:
    """Returns why the kernel cannot take these weights, or None if it can."""
    return next(filter(None, map(cpu.limit, filter(None, weights.codings))), None)


def describe() -> str:
    """Returns what the loaded kernels are, with the instruction set in use."""
    library = cpu.get_library()
    assert isinstance(library, cpu.Library)
    return f"C++ kernels for {library.isa}"


def _call(
    target: str,
    x: Array,
    weights: ExpertWeights,
    more: tuple[Array, ...],
    activation: Activation,
    activations: Activations,
) -> Array:
    """Runs a kernel; an absent bias is an empty array.

    more: operands after the biases.
    """
    gate_up, gate_up_rest, gate_up_form = cpu.operands(weights.gate_up_E2FD, activations)
    down, down_rest, down_form = cpu.operands(weights.down_EDF, activations)
    none = jnp.zeros((0,), jnp.float32)
    biases = (weights.gate_up_bias_E2F, weights.down_bias_ED)
    bias_arrays = (none if bias is None else as_float(bias).astype(jnp.float32) for bias in biases)
    return cpu.call(
        target, x.shape, x, gate_up, down, *bias_arrays, *more, *gate_up_rest, *down_rest,
        activation=ACTIVATIONS.index(activation), gate_up_form=gate_up_form, down_form=down_form,
    )  # fmt: skip
