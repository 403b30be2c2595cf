"""``jmoe bench moe-layer``: only the routed experts of one layer, by batch size and active experts."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jmoe_kernels.grouped_mlp import ExpertWeights, pick, storage_dtype

from jmoe.checkpoint import read_config
from jmoe.checkpoint.checkpoint import aligned_empty
from jmoe.checkpoint.source import ModelFiles
from jmoe.config.choices import DTypeChoice
from jmoe.config.model import ModelConfig
from jmoe.engine.deployment.settings import model_directory
from jmoe.moe.experts import ExpertMath
from jmoe.moe.routing import plan_dispatch
from jmoe.tools.progress import Progress, silent

Layers = list[ExpertWeights]


@dataclass(frozen=True)
class Point:
    """A row of the report.

    tokens: tokens of a step.
    num_experts: number of experts that they may choose from.
    """

    tokens: int
    num_experts: int


def layer_config(model: ModelFiles, dtype: DTypeChoice = "auto") -> ModelConfig:
    """Returns the model config from a TOML of sizes, or from a model's directory."""
    if isinstance(model, str) and model.endswith(".toml"):
        cfg = ModelConfig.from_file(Path(model))
        return cfg if dtype == "auto" else dataclasses.replace(cfg, dtype=dtype)
    return read_config(model_directory(model) if isinstance(model, str) else model, dtype)


def bench_moe_layer(
    model: ModelFiles,
    *,
    batch_sizes: Sequence[int],
    active: Sequence[int] = (),
    layers: int = 4,
    iterations: int = 7,
    dtype: DTypeChoice = "auto",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measures medians over ``iterations`` of a run through ``layers`` layers of random weights, one after
    another, so that caches do not hold them.

    The GB/s count each active expert's weights once.

    active: numbers of experts to which the largest batch is confined in more rows.
    """
    cfg = layer_config(model, dtype)
    if not cfg.num_experts:
        raise ValueError(f"{model} has no routed experts")
    k, experts = cfg.num_experts_per_tok, cfg.num_experts
    if min([layers, iterations, *batch_sizes], default=0) < 1 or not batch_sizes:
        raise ValueError("batch sizes, layers and num-iters must be at least 1")
    if bad := [n for n in active if not k <= n <= experts]:
        raise ValueError(f"active experts lie between {k} (a token's) and {experts}, got {bad[0]}")
    kind = jnp.dtype(cfg.dtype)
    stacks = make_layers(cfg, layers, kind)
    kernel, why = pick(jax.default_backend(), stacks[0].dtype, stacks[0].dims)
    run = layer_step(kernel)
    points = [Point(n, experts) for n in batch_sizes] + [Point(max(batch_sizes), n) for n in active]
    one = 3 * cfg.moe_intermediate_size * cfg.hidden_size * kind.itemsize
    rows = []
    for i, point in enumerate(points, 1):
        rows.append(measure(run, cfg, point, stacks, iterations, one))
        progress("bench", i, len(points))
    return {
        "model": str(model),
        "experts": experts,
        "experts_per_token": k,
        "expert_bytes": one,
        "dtype": kind.name,
        "kernel": kernel,
        "why": why,
        "platform": jax.default_backend(),
        "layers": layers,
        "iterations": iterations,
        "rows": rows,
    }


def make_layers(cfg: ModelConfig, count: int, dtype: jnp.dtype) -> Layers:
    """Makes the weights of ``count`` layers, normal with a standard deviation of one over the square root of
    their inputs, stored as the loader stores them."""
    kept = storage_dtype(dtype)
    e, f, d = cfg.num_experts, cfg.moe_intermediate_size, cfg.hidden_size

    def stack(seed: int, *shape: int) -> Array:
        buffer = aligned_empty(shape, np.dtype(kept))
        rng = np.random.default_rng(seed)
        for expert in buffer:
            normal = rng.standard_normal(expert.shape, np.float32) * np.float32(shape[-1] ** -0.5)
            expert[...] = np.asarray(jnp.asarray(normal, dtype)).view(np.dtype(kept))
        return jax.device_put(buffer, may_alias=True)

    return [ExpertWeights(stack(2 * i, e, 2, f, d), stack(2 * i + 1, e, d, f)) for i in range(count)]


def layer_step(kernel: Any) -> Callable[[Array, Array, Layers], Array]:
    """Returns a jitted run through all layers: (x, ids, layers) -> x plus the outputs of the layers."""

    @jax.jit
    def run(x_TD: Array, ids_TK: Array, layers: Layers) -> Array:
        plan = plan_dispatch(ids_TK, jnp.ones(len(x_TD), bool), 0, layers[0].dims[0])
        weights_TK = jnp.full(ids_TK.shape, 1 / ids_TK.shape[1])
        experts = ExpertMath(kernel)
        for weights in layers:
            x_TD = x_TD + experts(x_TD, weights_TK, plan, weights)
        return x_TD

    return run


def random_routing(point: Point, k: int) -> np.ndarray:
    """Returns ``k`` distinct experts for each token, drawn uniformly from the allowed ones, ``[T, K]``."""
    rng = np.random.default_rng(0)
    return np.stack([rng.permutation(point.num_experts)[:k] for _ in range(point.tokens)]).astype(np.int32)


def measure(
    run: Callable, cfg: ModelConfig, point: Point, layers: Layers, iterations: int, expert_bytes: int
) -> dict[str, float]:
    """Measures one row: milliseconds per layer, bytes read and operations computed per second."""
    k, f, d = cfg.num_experts_per_tok, cfg.moe_intermediate_size, cfg.hidden_size
    ids_TK = random_routing(point, k)
    x_TD = np.random.default_rng(1).standard_normal((point.tokens, d), np.float32)
    jax.block_until_ready(run(x_TD, ids_TK, layers))  # compiles
    taken = []
    for _ in range(iterations):
        start = time.perf_counter()
        jax.block_until_ready(run(x_TD, ids_TK, layers))
        taken.append((time.perf_counter() - start) / len(layers))
    seconds, active = statistics.median(taken), len(np.unique(ids_TK))
    return {
        "tokens": point.tokens,
        "active_experts": active,
        "ms": seconds * 1e3,
        "gb_per_s": active * expert_bytes / seconds / 1e9,
        "gflop_per_s": 6 * point.tokens * k * f * d / seconds / 1e9,
    }
