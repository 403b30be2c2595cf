"""Times expert layers: random weights as the loader places them, a step through all layers, paired rounds.

Its import loads jax: set the process's cores before.
"""

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jmoe_kernels.grouped_mlp import ExpertWeights

from jmoe.checkpoint.checkpoint import aligned_empty
from jmoe.moe.experts import ExpertMath
from jmoe.moe.routing import plan_dispatch


def read_bandwidth(arrays: list[Any], threads: int, passes: int = 5) -> float:
    """Measures the bytes per second that ``threads`` threads read from the arrays."""
    flat = [part for a in arrays for part in np.array_split(a.reshape(-1).view(np.uint64), 2 * threads)]
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(passes):
            start = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, flat))
            best = min(best, time.perf_counter() - start)
    return sum(a.nbytes for a in arrays) / best


def make_layers(cfg: Any, count: int) -> list[Any]:
    """Returns random weights of ``count`` layers, kept in memory in the same way as by the loader."""

    def stack(seed: int, *shape: int) -> Any:
        buffer = aligned_empty(shape, np.dtype(np.uint16))
        rng = np.random.default_rng(seed)
        for expert in buffer:
            normal = rng.standard_normal(expert.shape, np.float32) * np.float32(shape[-1] ** -0.5)
            expert[...] = np.asarray(jnp.asarray(normal, jnp.bfloat16)).view(np.uint16)
        return jax.device_put(buffer, may_alias=True)

    e, f, d = cfg.num_experts, cfg.moe_intermediate_size, cfg.hidden_size
    return [ExpertWeights(stack(2 * i, e, 2, f, d), stack(2 * i + 1, e, d, f)) for i in range(count)]


def layers_step(implementation: Any, k: int) -> Any:
    """Returns a jitted run through all layers: (x, ids, layers) -> y."""

    @jax.jit
    def run(x_TD: Any, ids_TK: Any, layers: list[Any]) -> Any:
        plan = plan_dispatch(ids_TK, jnp.ones(len(x_TD), bool), 0, layers[0].dims[0])
        experts = ExpertMath(implementation)
        for weights in layers:
            x_TD = x_TD + experts(x_TD, jnp.full(ids_TK.shape, 1 / k), plan, weights)
        return x_TD

    return run


def median_seconds(
    runs: dict[str, Any], x: Any, ids: Any, layers: list[Any], rounds: int
) -> dict[str, float]:
    """Measures the median seconds per layer of each run. The runs take turns."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for name in runs:
        jax.block_until_ready(runs[name](x, ids, layers))
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(x, ids, layers))
            taken[name].append((time.perf_counter() - start) / len(layers))
    return {name: statistics.median(times) for name, times in taken.items()}


def linearity(active: list[int], seconds: list[float]) -> tuple[float, float, float]:
    """Returns (fixed seconds, seconds an active expert, R squared) of a straight line through the points."""
    slope, fixed = statistics.linear_regression(active, seconds)
    return fixed, slope, statistics.correlation(active, seconds) ** 2
