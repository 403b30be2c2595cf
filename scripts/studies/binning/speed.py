"""Measures time under LYNX on this machine: a layer by its active experts, the stage's own cost, the engine.

**Layer**: the sizes are those of OLMoE-1B-7B, and the assignments of 16 tokens are spread evenly over n
experts. The weights of several layers are used in turn, so that caches do not hold them. **Stage**: routing
alone is compared with routing and binning. **Engine**: a random model decodes the same prompts with and
without binning, in turns, from one set of weights in memory. The random model's gates are scaled so that
their logits have a standard deviation of about 1, and the width is calibrated so that it halves the experts
of a batch.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jmoe_kernels.grouped_mlp import pick
from shared.layer_sizes import shape_path
from shared.layer_timing import layers_step, linearity, make_layers, median_seconds, read_bandwidth
from shared.protocol import JMOE, Jmoe, Row, paired_ratio, random_rows, take_turns
from shared.random_checkpoint import checkpoint

from jmoe.checkpoint import load_model, read_config
from jmoe.config.model import ModelConfig
from jmoe.config.moe import MoEConfig
from jmoe.config.parts import RouterConfig
from jmoe.config.reading import read_toml
from jmoe.config.techniques import BinningConfig
from jmoe.mesh import make_mesh
from jmoe.moe.binning import bin_assignments, get_rule
from jmoe.moe.routing import route
from jmoe.moe.types import TokenFlags
from jmoe.nn.sequences import Sequences

LAYER = ModelConfig.from_file(shape_path("olmoe-1b-7b"))
TOY = SimpleNamespace(num_experts=16, moe_intermediate_size=64, hidden_size=64, num_experts_per_tok=2)
TOKENS = 16
ACTIVE = (1, 0.75, 0.5, 0.375, 0.25, 0.125)  # shares of the experts: 64, 48, 32, 24, 16, 8
REPEATS = 64  # runs of the stage in one compiled loop
HALF = 0.5  # the share of the union for which the engine's width is calibrated
BINNED = "binned"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the ``speed`` part of the results."""
    start, shape = time.perf_counter(), TOY if args.dry else LAYER
    layer = time_layer(shape, args.layers, args.rounds, args.threads)
    layer |= {"stage": time_stage(shape, args.rounds)}
    print(f"layer: {time.perf_counter() - start:.0f} s", flush=True)
    return {
        "threads": len(os.sched_getaffinity(0)),
        "rounds": args.rounds,
        "layer": layer,
        "engine": time_engine(args),
        "seconds": round(time.perf_counter() - start),
    }


# ---- a layer


def even_ids(tokens: int, k: int, active: int) -> np.ndarray:
    """Returns ``[tokens, k]`` ids, spread evenly over the first ``active`` experts, distinct in a token."""
    return (np.arange(tokens * k) % active).reshape(tokens, k).astype(np.int32)


def time_layer(shape: Any, layers: int, rounds: int, threads: int) -> dict[str, Any]:
    """Returns the median seconds of a layer by its active experts, and the line through them."""
    weights, k = make_layers(shape, layers), shape.num_experts_per_tok
    dims = shape.num_experts, shape.moe_intermediate_size, shape.hidden_size
    kernel, why = pick(jax.default_backend(), jnp.bfloat16, dims)
    run = layers_step(kernel, k)
    x = np.random.default_rng(1).standard_normal((TOKENS, dims[2]), np.float32)
    counts = [int(share * dims[0]) for share in ACTIVE]

    def at(active: int, x: Any, ids: Any, weights: Any) -> Any:
        return run(x, even_ids(TOKENS, k, active), weights)

    runs = {str(n): partial(at, n) for n in counts}
    taken = median_seconds(runs, x, None, weights, rounds)
    fixed, each, r_squared = linearity(counts, [taken[str(n)] for n in counts])
    expert_bytes = 3 * dims[1] * dims[2] * 2
    arrays = [np.asarray(w.gate_up_E2FD) for w in weights]
    return {
        "dims": dims,
        "top_k": k,
        "tokens": TOKENS,
        "layers": layers,
        "kernel": why,
        "seconds": taken,
        "fixed": fixed,
        "each": each,
        "r_squared": r_squared,
        "expert_bytes": expert_bytes,
        "bytes_per_s": expert_bytes / each,
        "read_bandwidth": read_bandwidth(arrays, threads),
    }


def time_stage(shape: Any, rounds: int) -> dict[str, float]:
    """Returns the median seconds of routing 16 tokens, alone and with each active set's rule."""
    logits = jax.random.normal(jax.random.key(0), (REPEATS, TOKENS, shape.num_experts))
    flags, k = TokenFlags(jnp.ones(TOKENS, bool)), shape.num_experts_per_tok

    def routed(logits_TE: Array) -> tuple[Array, Array]:
        plain = route(logits_TE, k, RouterConfig(norm_topk_prob=False))
        return plain.ids_TK, plain.weights_TK

    def binned(logits_TE: Array, cfg: BinningConfig) -> tuple[Array, Array]:
        plain = route(logits_TE, k, RouterConfig(norm_topk_prob=False))
        moved, _ = bin_assignments(plain, flags, get_rule(cfg, k), seed=jnp.int32(0))
        return moved.ids_TK, moved.weights_TK

    stages: dict[str, Callable] = {"route": routed, "affinity": partial(binned, cfg=BinningConfig())}
    runs = {name: jax.jit(partial(lax.map, stage)) for name, stage in stages.items()}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-1, rounds):  # the first compiles
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(logits))
            if turn >= 0:
                taken[name].append((time.perf_counter() - start) / REPEATS)
    return {name: statistics.median(times) for name, times in taken.items()}


# ---- the engine


def time_engine(args: argparse.Namespace) -> dict[str, Any]:
    """Returns tokens/s by batch with and without binning, measured in turns."""
    args = argparse.Namespace(**vars(args) | {"prompt": args.context, "dtype": "bfloat16"})
    hidden = read_toml(args.sizes)["hidden_size"]
    scale = 1 / (0.02 * hidden**0.5)  # a gate's input has unit square mean
    found: dict[str, Any] = {
        "sizes": args.sizes.stem,
        "context": args.context,
        "new": args.new,
        "batches": {},
    }
    with checkpoint(str(args.sizes), gate_scale=scale) as directory:
        cfg = read_config(directory, "bfloat16")
        found |= {"gate_scale": scale, "logit_std": logit_std(directory)}
        rows = {name: row for name, row in random_rows(args, cfg.vocab_size).items() if row.phase == "decode"}
        plain = Jmoe(directory, args)
        for row in rows.values():
            found["batches"][str(len(row.prompts))] = time_row(directory, args, plain, row)
    return found


def time_row(directory: Path, args: argparse.Namespace, plain_engine: Jmoe, row: Row) -> dict[str, Any]:
    with_width = partial(binned_engine, directory, args, plain_engine)

    def share(width: float) -> float:
        with with_width(width) as engine:
            return active_share(engine, row, min(16, row.new))[0]

    width, _ = bisect(share, HALF, 0.0, 4.0)
    with with_width(width) as engine:
        contenders: Any = {"decode": [(JMOE, plain_engine.decode), (BINNED, engine.decode)]}
        samples, equal = take_turns({"decode": row}, contenders, args.rounds)
        reached, active, union = active_share(engine, row, row.new)
    speeds = samples["decode"]
    return {
        "width": width,
        "share": reached,
        "active": active,
        "union": union,
        "tokens_per_second": speeds,
        "ratio": paired_ratio(speeds[BINNED], speeds[JMOE]),
        "equal_tokens": equal["decode"][BINNED],
    }


@contextmanager
def binned_engine(
    directory: Path, args: argparse.Namespace, plain_engine: Jmoe, width: float
) -> Iterator[Jmoe]:
    """Yields an engine with affinity binning that uses the weights of ``plain_engine``."""
    moe = MoEConfig(binning=BinningConfig(bin_width=width))
    engine = Jmoe(directory, args, moe=moe, warm_up=False)
    engine.engine.runner.weights = plain_engine.engine.runner.weights
    try:
        yield engine
    finally:
        engine.llm.close()


def active_share(engine: Jmoe, row: Row, new: int) -> tuple[float, float, float]:
    """Decodes ``row`` and returns (active over the union, active, union), in experts per layer and step."""
    counters = engine.engine.runner.counters["decode"]
    engine.engine.runner.drain()
    before = counters.active_L.sum(), counters.plain_active_L.sum(), counters.steps
    engine.decode(row.prompts, new)
    engine.engine.runner.drain()
    each = (counters.steps - before[2]) * len(counters.active_L)
    active, union = counters.active_L.sum() - before[0], counters.plain_active_L.sum() - before[1]
    return float(active / union), float(active / each), float(union / each)


def bisect(share: Callable[[float], float], target: float, low: float, high: float) -> tuple[float, float]:
    """Returns (width, its share), where the share is within 1 % of ``target`` or as near as eight tries get.

    share: rising function of the width.
    """
    width = found = float("nan")
    for _ in range(8):
        width = (low + high) / 2
        found = share(width)
        if abs(found - target) < 0.01:
            break
        low, high = (width, high) if found < target else (low, width)
    return width, found


def logit_std(directory: Path) -> list[float]:
    """Returns the standard deviation of the gates' logits in each layer, on a sequence of random tokens."""
    graph, state = nnx.split(load_model(directory, make_mesh(), MoEConfig()))

    @jax.jit
    def measured(state: Any, seqs: Sequences) -> list[Array]:
        return [jnp.std(routing.logits_TE) for routing in nnx.merge(graph, state)(seqs).routing]

    vocab = read_config(directory).vocab_size
    tokens = np.random.default_rng(2).integers(0, vocab, (1, 64)).astype(np.int32)
    seqs = Sequences(jnp.asarray(tokens), jnp.arange(64, dtype=jnp.int32)[None])
    return [float(std) for std in measured(state, seqs)]
