"""Grouped MLP by the C++ kernel (``cpu/src/grouped_mlp.cc``), which also gathers and combines tokens."""

from typing import Any, get_args

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jmoe_kernels import cpu
from jmoe_kernels.grouped_mlp.types import ExpertWeights
from jmoe_kernels.quantised import as_float
from jmoe_kernels.settings import Activation

ACTIVATIONS = get_args(Activation)  # the kernel knows them by their index


def grouped_mlp_cpu(
    x_ND: Float[Array, "N D"],
    weights: ExpertWeights,
    group_sizes_E: Int[Array, " E"],
    activation: Activation = "silu",
) -> Float[Array, "N D"]:
    """Computes ``down(act(gate x) * up x)`` of rows sorted by expert; rows past the last group are zero."""
    args = (x_ND, *_arrays(weights), group_sizes_E.astype(jnp.int32))
    return cpu.call("jmoe_grouped_mlp", x_ND.shape, *args, activation=ACTIVATIONS.index(activation))


def combined_mlp_cpu(
    x_TD: Float[Array, "T D"],
    combine_TK: Float[Array, "T K"],
    order_N: Int[Array, " N"],
    weights: ExpertWeights,
    group_sizes_E: Int[Array, " E"],
    activation: Activation = "silu",
) -> Float[Array, "T D"]:
    """Returns each token's sum of its experts' outputs times ``combine_TK``.

    order_N: assignment ``t * K + k`` of each row in the order by expert; those past the last group are
        unused.
    """
    args = (x_TD, *_arrays(weights), group_sizes_E, order_N, combine_TK)
    return cpu.call("jmoe_combined_mlp", x_TD.shape, *args, activation=ACTIVATIONS.index(activation))


def limit(weights: ExpertWeights, rows: int, activation: str) -> str | None:
    """Returns why the kernel cannot take these weights, or None if it can."""
    coding = next(filter(None, weights.codings), None)
    return coding and f"weights are quantised ({coding}); the kernel takes bfloat16 and float32"


def describe() -> str:
    """Returns what the loaded kernels are, with the instruction set in use."""
    library = cpu.get_library()
    assert isinstance(library, cpu.Library)
    return f"C++ kernels for {library.isa}"


def _arrays(weights: ExpertWeights) -> tuple[Any, ...]:
    """Returns the four operands; an absent bias is an empty array."""
    none = jnp.zeros((0,), jnp.float32)
    biases = (weights.gate_up_bias_E2F, weights.down_bias_ED)
    bias_arrays = (none if bias is None else as_float(bias).astype(jnp.float32) for bias in biases)
    return weights.gate_up_E2FD, weights.down_EDF, *bias_arrays
