"""The implementations of the grouped MLP: one record each, which ``api`` and the layers read.

A new one needs its name in ``ExpertKernel``, its file in this folder, and its record here. The Pallas modules
are imported when they are needed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jax import Array

from jmoe_kernels import cpu
from jmoe_kernels.backends import ExpertKernel
from jmoe_kernels.grouped_mlp.batched import grouped_mlp_batched
from jmoe_kernels.grouped_mlp.cpu import combined_mlp_cpu, describe, grouped_mlp_cpu, limit
from jmoe_kernels.grouped_mlp.reference import grouped_mlp_reference
from jmoe_kernels.grouped_mlp.xla import grouped_mlp_xla
from jmoe_kernels.lazy import LazyFunction
from jmoe_kernels.quantised import Coding, LayoutName

PALLAS_TPU = "jmoe_kernels.grouped_mlp.pallas_tpu"
PALLAS_GPU = "jmoe_kernels.grouped_mlp.pallas_gpu"


@dataclass(frozen=True)
class Implementation:
    """One way to compute the grouped MLP. The defaults hold for one that runs anywhere, on any shapes.

    run: function (x_ND, weights, group_sizes_E, activation=...) that returns the outputs of the rows.
    run_combined: function (x_TD, weights_TK, order_N, weights, group_sizes_E, activation, activations) that
        also gathers the rows of tokens and sums each token's outputs; None if there is none.
    why_missing: function that returns why this machine cannot run it, or None if it can.
    limit: function (weights, rows, activation) that returns the limit that static shapes or dtypes
        exceed, or None.
    describe: function that returns what it is, in a few words for a person.
    rows_dtype: dtype to which rows are converted first; None takes them as they are.
    has_interpreter: whether it has an interpreter, which runs on any platform.
    why_unrounded: function (coding) that returns why activations are not rounded to int8 where it multiplies
        with a weight's codes, or None if they are; its functions then take what they are rounded to. None for
        an implementation that multiplies with no codes.
    layout_of: function (coding) that returns the layout in which it wants a quantised weight.
    is_for_training: whether it takes a limit on an expert's rows, and jax differentiates it; the others have
        the gradient of "batched".
    """

    run: Callable[..., Array]
    run_combined: Callable[..., Array] | None = None
    why_missing: Callable[[], str | None] = lambda: None
    limit: Callable[[Any, int, str], str | None] = lambda weights, rows, activation: None
    describe: Callable[[], str] = lambda: "portable XLA"
    rows_dtype: str | None = None
    has_interpreter: bool = False
    why_unrounded: Callable[[Coding], str | None] | None = None
    layout_of: Callable[[Coding], LayoutName] = lambda coding: "rows"
    is_for_training: bool = False


IMPLEMENTATIONS: dict[ExpertKernel, Implementation] = {
    "xla": Implementation(grouped_mlp_xla),
    "pallas_tpu": Implementation(
        LazyFunction(PALLAS_TPU, "grouped_mlp_pallas_tpu"),
        limit=LazyFunction(PALLAS_TPU, "limit"),
        describe=lambda: "the Pallas kernels for tpu",
        has_interpreter=True,
        why_unrounded=LazyFunction(PALLAS_TPU, "why_unrounded"),
        layout_of=lambda coding: "columns",
    ),
    "pallas_gpu": Implementation(
        LazyFunction(PALLAS_GPU, "grouped_mlp_pallas_gpu"),
        limit=LazyFunction(PALLAS_GPU, "limit"),
        describe=lambda: "the Pallas kernels for gpu",
        rows_dtype="bfloat16",
        has_interpreter=True,
        why_unrounded=LazyFunction(PALLAS_GPU, "why_unrounded"),
        layout_of=lambda coding: "tiles",
    ),
    "cpu": Implementation(
        grouped_mlp_cpu,
        run_combined=combined_mlp_cpu,
        why_missing=cpu.why_missing,
        limit=limit,
        describe=describe,
        why_unrounded=cpu.limit,
        layout_of=lambda coding: "n16" if cpu.limit(coding) is None else "rows",
    ),
    "batched": Implementation(grouped_mlp_batched, is_for_training=True),
    "reference": Implementation(grouped_mlp_reference),
}
