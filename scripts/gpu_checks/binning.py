"""Checks binning on this machine's GPU: compares the kernel with the reference, and times a call of both."""

from dataclasses import fields
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jmoe_kernels.binning import Binned, BinningKernel, KernelChoice, Rule, bin_experts
from jmoe_kernels.binning.cases import CASES, SMALL, Case, make_inputs
from shared.gpu_timing import seconds_per_call

METHODS = ("affinity", "oea", "budget", "popularity")
TOLERANCE = 1e-5  # for weights and scores; ids, set, order and sizes must be equal


@cache
def compiled(implementation: BinningKernel, rule: Rule, dry: bool):
    """Returns the compiled function (logits, valid, lossy) -> Binned.

    implementation: implementation that the function runs.
    rule: rule of binning.
    dry: whether the kernel runs in the interpreter.
    """

    def run(logits_TE: Array, valid_T: Array, lossy_T: Array) -> Binned:
        return bin_experts(
            logits_TE,
            valid_T,
            lossy_T,
            rule,
            KernelChoice(implementation, "cpu" if dry else "gpu", interpret=dry and implementation != "xla"),
            renormalize=True,
        )

    return jax.jit(run)


def differing(case: Case, method: str, dry: bool) -> list[str]:
    """Returns the fields in which the kernel and the reference differ."""
    rule = Rule(method, case.k, bin_width=0.5, k0=min(2, case.k), keep=0.5)  # type: ignore[arg-type]
    inputs = make_inputs(case)
    got, want = (compiled(name, rule, dry)(*inputs) for name in ("pallas_gpu", "xla"))

    def equal(a: np.ndarray, b: np.ndarray) -> bool:
        return np.allclose(a, b, rtol=0, atol=TOLERANCE) if a.dtype == np.float32 else np.array_equal(a, b)

    names = [field.name for field in fields(Binned)]
    return [n for n in names if not equal(np.asarray(getattr(got, n)), np.asarray(getattr(want, n)))]


def batches(method: str, dry: bool) -> list[Case]:
    """Returns the named batches to compare. Only affinity gets batches of other shapes than ``SMALL``.

    The batch with a NaN is left out, because no rule says what a NaN chooses.
    """
    if dry:
        return list(CASES[:1])
    alike = [c for c in CASES if method == "affinity" or (c.tokens, c.experts, c.k) == SMALL]
    return [case for case in alike if case.name != "a NaN token"]


def binning_seconds(implementation: BinningKernel, tokens: int, experts: int, k: int, dry: bool) -> float:
    """Returns the median seconds of a call by affinity. All outputs of the call are used."""
    logits_TE, valid_T, lossy_T = map(jnp.asarray, make_inputs(Case("timed", tokens, experts, k)))
    run = compiled(implementation, Rule("affinity", k, bin_width=0.5, k0=1, keep=0.5), dry)

    def step(logits_TE: Array, masks: tuple[Array, Array]) -> Array:
        return lax.optimization_barrier(run(logits_TE, *masks)).order_N

    return seconds_per_call(step, logits_TE, [(valid_T, lossy_T)] * 2, dry, calls=200)
