"""Times the experts' C++ kernel on random weights of every form, several rows an expert.

Its import loads jax: set the process's cores before.
"""

import time
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jmoe_kernels.grouped_mlp import ExpertWeights
from jmoe_kernels.grouped_mlp.cpu import grouped_mlp_cpu
from jmoe_kernels.quantised import LAYOUTS, Coding, Quantised, code_storage
from jmoe_kernels.settings import Activations

from jmoe.checkpoint.checkpoint import aligned_empty

PLAIN = "bfloat16"
FORMS: dict[str, Coding | None] = {
    PLAIN: None,
    "int8, row": Coding("int8", None),
    "int8, 32": Coding("int8", 32, "float16"),
    "int8, 16": Coding("int8", 16),
    "e4m3, row": Coding("e4m3", None),
    "e4m3, 128": Coding("e4m3", 128),
    "int4, 128": Coding("int4", 128, "bfloat16"),
    "int4, 32": Coding("int4", 32, "bfloat16"),
    "int4, 32, lows": Coding("int4", 32, "float16", has_lows=True),
    "iq4, 32": Coding("iq4", 32, "float16"),
    "MXFP4": Coding("e2m1", 32, "uint8"),
    "NVFP4": Coding("e2m1", 16),
}


@dataclass(frozen=True)
class Speed:
    """The rates that a run reached.

    weights: weights per second.
    read: stored bytes per second, with scales.
    flop: floating-point operations per second that the products stand for.
    """

    weights: float
    read: float
    flop: float


def random_experts(coding: Coding | None, dims: tuple[int, int, int]) -> ExpertWeights:
    """Returns random experts as the loader places them. dims: (experts, inner, model)."""
    experts, inner, model = dims
    shapes = (experts, 2, inner, model), (experts, model, inner)
    return ExpertWeights(*(_random(coding, shape, i) for i, shape in enumerate(shapes)))


def _random(coding: Coding | None, shape: tuple[int, ...], seed: int) -> Any:
    rng = np.random.default_rng(seed)

    def filled(array: Any, make: Any) -> np.ndarray:
        buffer = aligned_empty(array.shape, np.dtype(array.dtype))
        buffer[...] = make(array.shape[1:])  # experts are alike: random numbers take longer than the runs
        return buffer

    if coding is None:
        numbers = filled(jax.ShapeDtypeStruct(shape, np.uint16), lambda s: rng.integers(15000, 16000, s))
        return jax.device_put(numbers, may_alias=True)
    shapes = coding.shapes(shape)
    kept = code_storage(coding.code, "cpu")
    codes = filled(jax.ShapeDtypeStruct(shapes.values.shape, kept), lambda s: rng.integers(0, 120, s))
    per_group = (lambda s: rng.integers(118, 124, s)) if coding.scales == "uint8" else (lambda s: 0.02)
    arrays = Quantised(codes, filled(shapes.scales, per_group), None, coding, "float32", "n16")
    if coding.has_lows:
        arrays = replace(arrays, lows=filled(shapes.lows, lambda s: -0.01))
    pack = LAYOUTS[arrays.layout].pack
    packed = jax.tree.map(lambda role, array: pack(array, role, coding.code, True), arrays.roles, arrays)
    return jax.tree.map(lambda a: jax.device_put(a, may_alias=True), packed)


def measure(
    weights: ExpertWeights, rows: int, activations: Activations, stored_bytes: int, seconds: float
) -> Speed:
    """Measures products of ``rows`` rows with each expert for some seconds; the best run counts."""
    experts, inner, model = weights.dims
    x = jax.random.normal(jax.random.key(0), (experts * rows, model))
    sizes = jnp.full(experts, rows, jnp.int32)
    run = jax.jit(lambda x, w, sizes: grouped_mlp_cpu(x, w, sizes, "silu", activations))
    jax.block_until_ready(run(x, weights, sizes))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        jax.block_until_ready(run(x, weights, sizes))
        best = min(best, time.perf_counter() - start)
    count = 3.0 * experts * inner * model
    return Speed(count / best, stored_bytes / best, 2 * count * rows / best)
