"""Compares the GPU kernels with float64 on the host, for inputs that are new in every run."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from gpu_checks.peers import ours
from gpu_checks.rows import Check
from jax import Array
from jmoe_kernels.grouped_mlp.types import ExpertWeights
from shared.gpu_timing import random_rows, random_weights
from shared.layer_sizes import layer_sizes

TOLERANCE = 0.02  # for outputs of about 1: a few units of bfloat16 in h


def float64_reference(x: Array, w: ExpertWeights, sizes: np.ndarray, activation: str) -> np.ndarray:
    """Returns the layer in float64 on the host, with h rounded to bfloat16 as in the kernels."""
    y, start = np.zeros(x.shape), 0
    for e in np.flatnonzero(sizes):
        rows = np.asarray(x[start : start + sizes[e]], np.float64)
        gate, up = (rows @ np.asarray(w.gate_up_E2FD[e, i], np.float64).T for i in (0, 1))
        if w.gate_up_bias_E2F is not None:
            bias = np.asarray(w.gate_up_bias_E2F[e], np.float64)
            gate, up = gate + bias[0], up + bias[1]
        if activation == "swiglu_oai":
            gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
            h = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
        else:
            h = gate / (1 + np.exp(-gate)) * up
        h = np.asarray(jnp.asarray(h, jnp.bfloat16), np.float64)
        out = h @ np.asarray(w.down_EDF[e], np.float64).T
        y[start : start + sizes[e]] = (
            out if w.down_bias_ED is None else out + np.asarray(w.down_bias_ED[e], np.float64)
        )
        start += sizes[e]
    return y


def patterns(rng: np.random.Generator, dry: bool) -> dict[str, np.ndarray]:
    """Returns named group sizes. Those of "decode" run the decode kernels, those of "prefill" the others."""
    experts = 3 if dry else 16
    found = {"decode, ragged": rng.integers(0, 5, experts), "decode, no rows": np.zeros(experts, int)}
    if not dry:
        found["decode, one row each"] = np.ones(experts, int)
        hot = np.zeros(experts, int)
        hot[rng.integers(experts)] = 700
        found |= {
            "decode, up to 60 rows": rng.integers(0, 60, experts),
            "decode, one hot expert": hot,
            "prefill, ragged": rng.integers(100, 320, experts),
            "prefill, half empty": rng.integers(300, 600, experts) * (np.arange(experts) % 2),
        }
    return found


def correctness(check: Check) -> None:
    """Compares new random inputs with float64, plain and with biases. Each case runs separately."""
    rng = np.random.default_rng(time.time_ns())
    for name, sizes in patterns(rng, check.dry).items():
        for biased in (False,) if check.dry and sizes.sum() == 0 else (False, True):
            label = f"{name}{', biases' if biased else ''}"
            try:
                error, zeros = largest_error(rng, np.asarray(sizes, np.int32), biased, check.dry)
            except Exception as raised:
                check.add("correct", label, "", verdict=f"ERROR {type(raised).__name__}: {str(raised)[:160]}")
                continue
            verdict = "pass" if error < TOLERANCE and zeros else "FAIL"
            check.add("correct", label, f"error {error:.1e}", None, None, verdict)


def largest_error(rng: np.random.Generator, sizes: np.ndarray, biased: bool, dry: bool) -> tuple[float, bool]:
    """Returns the kernel's largest error, and whether the rows after the used ones are 0.

    The inputs are NaN in every place that the kernel may not read.
    """
    inner, model = (64, 64) if dry else layer_sizes("qwen3-30b-a3b").dims[1:]
    used, past = int(sizes.sum()), int(rng.integers(0, 9))
    keys = [jax.random.key(int(rng.integers(1 << 30))) for _ in range(2)]
    w = random_weights(keys[0], len(sizes), inner, model)
    if biased:
        biases = jax.random.normal(keys[1], (len(sizes), 2, inner)), w.down_EDF[:, :, 0]
        w = ExpertWeights(w.gate_up_E2FD, w.down_EDF, *biases)
    x = random_rows(max(1, used + past), model, int(rng.integers(1 << 30)))
    activation = "swiglu_oai" if biased else "silu"
    want = float64_reference(x, w, sizes, activation)
    off = jnp.asarray(sizes == 0)

    def poison(a: Array) -> Array:
        return jnp.where(off.reshape(-1, *[1] * (a.ndim - 1)), jnp.nan, a).astype(a.dtype)

    run = jax.jit(ours(sizes, dry, activation))
    got = np.asarray(run(x.at[used:].set(jnp.nan), jax.tree.map(poison, w)), np.float64)
    error = float(np.abs(got - want).max()) if np.isfinite(got).all() else float("nan")
    return error, not got[used:].any()
