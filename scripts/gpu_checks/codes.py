"""Checks the GPU kernels with every form of quantised weights, and times them beside bfloat16."""

import functools
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from gpu_checks.correctness import float64_reference
from gpu_checks.peers import ours, routed_sizes
from gpu_checks.rows import Check
from jax import Array
from jmoe_kernels.grouped_mlp.types import ExpertWeights
from jmoe_kernels.quantised import LAYOUTS, Code, Coding, Quantised, dequantised
from shared.gpu_timing import random_rows, seconds_per_call, stack_count, weight_stacks
from shared.layer_sizes import LayerSizes, layer_sizes

FORMS = (
    Coding("int8", None),
    Coding("int8", 128),
    Coding("int8", 32, "float16"),
    Coding("int4", None),
    Coding("int4", 128, "bfloat16"),
    Coding("int4", 32, "bfloat16"),
    Coding("int4", 32, "float16", has_lows=True),
    Coding("e4m3", None),
    Coding("e4m3", 128),
    Coding("e2m1", 32, "uint8"),
    Coding("e2m1", 16),
    Coding("iq4", 32, "float16"),
)
TOLERANCE = 0.05  # of the outputs' root mean square: h, and numbers that are scaled early, round to bfloat16


def codes(check: Check) -> None:
    """Compares every form with float64 of the dequantised weights, then times decode and prefill."""
    forms = FORMS[:1] + FORMS[9:10] if check.dry else FORMS
    for coding in forms:
        for name, sizes in _patterns(np.random.default_rng(time.time_ns()), check.dry).items():
            try:
                error = _largest_error(coding, sizes, check.dry)
            except Exception as raised:
                verdict = f"ERROR {type(raised).__name__}: {str(raised)[:160]}"
                check.add("codes", f"{coding}, {name}", "", verdict=verdict)
                continue
            verdict = "pass" if error < TOLERANCE else "FAIL"
            check.add("codes", f"{coding}, {name}", f"error {error:.1e}", None, None, verdict)
    layer = LayerSizes(3, 64, 64, 2) if check.dry else layer_sizes("qwen3-30b-a3b")
    shapes = {"1 row an expert": np.ones(layer.experts, np.int32)}
    if not check.dry:
        shapes["8 rows an expert"] = np.full(layer.experts, 8, np.int32)
        shapes["4096 tokens"] = routed_sizes(4096, layer.experts, layer.routed)
    for name, sizes in shapes.items():
        _time_forms(check, name, layer, sizes, forms)


def _patterns(rng: np.random.Generator, dry: bool) -> dict[str, np.ndarray]:
    """Returns named group sizes, for each width of the windows."""
    experts = 3 if dry else 16
    found = {"few rows": rng.integers(0, 5, experts)}
    if not dry:
        found |= {
            "some rows": rng.integers(5, 20, experts),
            "60 rows": rng.integers(20, 100, experts),
            "many rows": rng.integers(100, 320, experts) * (np.arange(experts) % 3 > 0),
        }
    return {name: sizes.astype(np.int32) for name, sizes in found.items()}


def _largest_error(coding: Coding, sizes: np.ndarray, dry: bool) -> float:
    """Returns the largest error relative to the root mean square; scales of experts without rows are NaN."""
    inner, model = (64, 64) if dry else layer_sizes("qwen3-30b-a3b").dims[1:]
    weights = random_coded(jax.random.key(time.time_ns() % (1 << 30)), len(sizes), inner, model, coding)
    x, off = random_rows(max(1, int(sizes.sum())), model), jnp.asarray(sizes == 0)
    plain = ExpertWeights(dequantised(weights.gate_up_E2FD), dequantised(weights.down_EDF))
    want = float64_reference(x, plain, sizes, "silu")

    def poison(scales: Array) -> Array:
        unread = jnp.asarray(255 if scales.dtype == jnp.uint8 else jnp.nan, scales.dtype)
        return jnp.where(off.reshape(-1, *[1] * (scales.ndim - 1)), unread, scales)

    gate_up, down = (replace(w, scales=poison(w.scales)) for w in (weights.gate_up_E2FD, weights.down_EDF))
    got = np.asarray(jax.jit(ours(sizes, dry))(x, ExpertWeights(gate_up, down)), np.float64)
    if not np.isfinite(got).all():
        return float("inf")
    return float(np.abs(got - want).max() / max(np.sqrt(np.mean(want**2)), 1e-9))


def _time_forms(
    check: Check, case: str, layer: LayerSizes, sizes: np.ndarray, forms: tuple[Coding, ...]
) -> None:
    """Times bfloat16 and every form; a form's limit is the copy bandwidth for its bytes."""
    x, active = random_rows(int(sizes.sum()), layer.model), int((sizes > 0).sum())
    plain = None
    for coding in (None, *forms):
        name = "bfloat16" if coding is None else str(coding)
        if check.late():
            check.add("codes", case, name, verdict="skipped: out of time")
            continue
        try:
            stacks = _stacks(layer, coding, check.dry)
            seconds = seconds_per_call(ours(sizes, check.dry), x, stacks, check.dry)
        except Exception as raised:
            check.add("codes", case, name, verdict=f"ERROR {type(raised).__name__}: {str(raised)[:160]}")
            continue
        plain = seconds if coding is None else plain
        read = sum(a.nbytes for a in jax.tree.leaves(stacks[0])) * active / layer.experts
        floor = read / (check.copy_bandwidth or float("nan"))
        verdict = f"bfloat16 x{plain / seconds:.2f}" if plain else ""
        check.add("codes", case, name, seconds, floor / seconds, verdict)


def _stacks(layer: LayerSizes, coding: Coding | None, dry: bool) -> list[ExpertWeights]:
    if coding is None:
        return weight_stacks(layer.dims, dry)
    nbytes = coding.nbytes((3 * layer.inner, layer.model), "tiles") * layer.experts
    count = 1 if dry else stack_count(nbytes)
    return [random_coded(jax.random.key(i), *layer.dims, coding) for i in range(count)]


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def random_coded(key: Array, experts: int, inner: int, model: int, coding: Coding) -> ExpertWeights:
    """Returns random weights in the layout of the GPU kernels, about as large as plain random ones."""
    keys = jax.random.split(key)
    gate_up = _random_weight(keys[0], (experts, 2, inner, model), coding)
    return ExpertWeights(gate_up, _random_weight(keys[1], (experts, model, inner), coding))


def _random_weight(key: Array, shape: tuple[int, ...], coding: Coding) -> Quantised:
    kept = coding.shapes(shape, "bfloat16", "tiles")
    of_values, of_scales, of_lows = jax.random.split(key, 3)
    table = _valid_bytes(coding.code).view(kept.values.dtype)
    spread = float(np.std(LAYOUTS["tiles"].numbers(table[None], coding.code)))
    values = jnp.asarray(table)[jax.random.bits(of_values, kept.values.shape, np.uint8)]
    size = shape[-1] ** -0.5 / spread
    if coding.scales == "uint8":
        exponents = 127 + round(np.log2(size)) + jax.random.randint(of_scales, kept.scales.shape, -1, 2)
        scales = exponents.astype(jnp.uint8)
    else:
        scales = size * jax.random.uniform(of_scales, kept.scales.shape, jnp.float32, 0.5, 1.5)
        scales = scales.astype(coding.scales)
    lows = None
    if coding.has_lows:
        normal = jax.random.normal(of_lows, kept.scales.shape)
        lows = (0.3 * shape[-1] ** -0.5 * normal).astype(coding.scales)
    return Quantised(values, scales, lows, coding, "bfloat16", "tiles")


def _valid_bytes(code: Code) -> np.ndarray:
    """Returns 256 bytes of the layout that are codes: without NaN, and without an E2M1 number's place -8."""
    every = np.arange(256, dtype=np.uint8)
    if code == "e4m3":
        every = every[every & 127 != 127]
    if code == "e2m1":
        every = every[(every & 15 != 8) & (every >> 4 != 8)]
    return np.resize(every, 256)
