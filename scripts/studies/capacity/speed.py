"""Measures the MoE layer's time under expert parallelism, on one device that does each rank's work in turn.

For plain top-k, each gamma and EPLB's placement, the experts' kernel runs with the group sizes that each of 8
ranks would have. The layer takes as long as the slowest rank, plus the time that the busiest rank's rows need
over the stated link (each way; bfloat16 out, float32 back), plus, with a capacity, the stage's own time.
Settings take turns in rounds, and a speed-up is a ratio within a round. Noise lengthens the slowest of
several equal ranks, so it works against the balanced settings; each time is the better of two.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jmoe_kernels.grouped_mlp import ExpertWeights, grouped_mlp, pick, storage_dtype
from shared.layer_sizes import layer_sizes
from shared.peaks import RANKS
from shared.published_routing import SLOTS
from studies.capacity.drawn_routing import Published, draw_ranks, limited_matrix, read_published

from jmoe.config.techniques import CapacityConfig
from jmoe.moe.capacity import ExpertShard, limit
from jmoe.moe.types import Routing, TokenFlags
from jmoe.placement.placement import balance

FACTORS = (2.0, 1.5, 1.0)
POLICIES = ("drop", "expand")
DOMAINS = ("github", "wikipedia")
BASELINE, EPLB = "plain", "eplb+8"
BUCKET = 256  # a rank's buffer is a multiple of this many rows, or of a sixteenth of the even share
STATED_PEAK = {"mixtral": 3.0, "olmoe": 7.0}  # the paper's words: "under 3N" (upcycled), "over 7N" (OLMoE)


@dataclass(frozen=True)
class Shape:
    """The sizes of a layer.

    experts: number of experts.
    k: number of experts of a token.
    model: width of the model.
    inner: width inside an expert.
    tokens: number of tokens of a rank.
    """

    experts: int
    k: int
    model: int
    inner: int
    tokens: int


def shape_of(name: str, tokens: int, divisor: int = 1) -> Shape:
    """Returns the sizes of a published model's layer, with its widths divided by ``divisor``."""
    layer = layer_sizes(name)
    return Shape(layer.experts, layer.routed, layer.model // divisor, layer.inner // divisor, tokens)


SCALED = {"mixtral": shape_of("mixtral-8x7b", 512, 8), "olmoe": shape_of("olmoe-1b-7b", 512, 4)}
REAL = {"mixtral": shape_of("mixtral-8x7b", 8192), "olmoe": shape_of("olmoe-1b-7b", 8192)}


@dataclass(frozen=True)
class Load:
    """The load that a setting gives the ranks.

    groups_RL: rows of each expert (slot) of each rank.
    rows_RR: rows from rank to rank.
    """

    groups_RL: np.ndarray
    rows_RR: np.ndarray

    def seconds_on_wire(self, model: int, bandwidth: float) -> float:
        """Returns the time of the busiest rank's rows each way: 2 bytes a number out, 4 back."""
        away_RR = self.rows_RR * ~np.eye(len(self.rows_RR), dtype=bool)
        busiest = max(away_RR.sum(0).max(), away_RR.sum(1).max())
        return float(busiest * model * (2 + 4) / bandwidth)


def load_of(sent_RE: np.ndarray) -> Load:
    """Returns the load with the experts in order over the ranks.

    Each rank has one empty slot too, so that all settings run alike.
    """
    ranks = len(sent_RE)
    groups_RL = sent_RE.sum(0).reshape(ranks, -1)
    return Load(np.pad(groups_RL, ((0, 0), (0, 1))), sent_RE.reshape(ranks, ranks, -1).sum(2))


def eplb_load_of(sent_RE: np.ndarray, history_E: np.ndarray) -> Load:
    """Returns the load with one redundant expert per rank, placed for ``history_E``.

    Replicas share an expert's rows evenly.
    """
    ranks, experts = sent_RE.shape
    placed = balance(history_E[None], slots=experts + ranks, ranks=ranks, model="bench")
    slot_P = placed.experts_LP[0]
    share_P = 1 / placed.replicas_LE[0][slot_P]
    rows_RP = sent_RE[:, slot_P] * share_P
    groups_RL = np.floor(rows_RP.sum(0)).astype(int).reshape(ranks, -1)
    return Load(groups_RL, rows_RP.reshape(ranks, ranks, -1).sum(2))


def stated(model: str, shape: Shape) -> Published:
    """Returns routing in which one expert has the peak load that the paper states, the others equal ones."""
    hot = STATED_PEAK[model] * shape.k / shape.experts
    chosen = np.full((1, shape.experts), (shape.k - hot) / (shape.experts - 1))
    chosen[0, 0] = hot
    return Published(np.ones(1), chosen, shape.k)


def loads_of(layer: Published, tokens: int) -> dict[str, Load]:
    """Returns the load of every setting on one batch."""
    ids, scores = draw_ranks(layer, tokens, seed=0)
    sent_RE = limited_matrix(ids, scores, None)
    loads = {BASELINE: load_of(sent_RE), EPLB: eplb_load_of(sent_RE, layer.often_V @ layer.chosen_VE)}
    for policy in POLICIES:
        for factor in FACTORS:
            cut_RE = limited_matrix(ids, scores, CapacityConfig(policy=policy), factor)
            loads[f"{policy}/{factor:g}"] = load_of(cut_RE)
    return loads


def weights_of(shape: Shape) -> ExpertWeights:
    """Returns random bfloat16 weights of one rank's experts and one more slot."""
    e, f, d = shape.experts // RANKS + 1, shape.inner, shape.model
    stored = storage_dtype(jnp.dtype(jnp.bfloat16))

    def stack(seed: int, *dims: int) -> Any:
        normal = jax.random.normal(jax.random.key(seed), dims, jnp.bfloat16) * dims[-1] ** -0.5
        return normal if stored == jnp.bfloat16 else jax.lax.bitcast_convert_type(normal, stored)

    return ExpertWeights(stack(0, e, 2, f, d), stack(1, e, d, f))


def best_of_two(run: Callable[[], Any]) -> float:
    taken = []
    for _ in range(2):
        start = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - start)
    return min(taken)


@dataclass(frozen=True)
class Timer:
    """Times the work of ranks.

    weights: weights of one rank.
    mlp: experts' kernel.
    bandwidth: bytes per second of the link.
    bucket: number of rows of which every buffer is a multiple, because every size compiles.
    """

    weights: ExpertWeights
    mlp: Callable[..., Any]
    bandwidth: float
    bucket: int

    def rank_runs(self, groups_RL: np.ndarray) -> list[Callable[[], Any]]:
        """Returns a function for each rank that does its experts' work, compiled and warm."""
        runs = []
        for groups_L in groups_RL:
            rows = max(1, -(-int(groups_L.sum()) // self.bucket)) * self.bucket
            x = jnp.ones((rows, self.weights.dims[2]), jnp.bfloat16)
            runs.append(partial(self.mlp, x, self.weights, jnp.asarray(groups_L, jnp.int32)))
            jax.block_until_ready(runs[-1]())
        return runs


def time_stage(layer: Published, shape: Shape, rounds: int) -> dict[str, float]:
    """Returns the median seconds of the capacity stage on one rank's tokens, by policy."""
    ids, scores = (jnp.asarray(a[0]) for a in draw_ranks(layer, shape.tokens, seed=0, ranks=1))
    held, flags = shape.experts // RANKS, TokenFlags(jnp.ones(shape.tokens, bool))

    def stage(ids_TK: Any, scores_TE: Any, cfg: CapacityConfig) -> Any:
        weights_TK = jnp.take_along_axis(scores_TE, ids_TK, 1)
        plain = Routing(ids_TK, weights_TK, scores_TE, jnp.log(scores_TE))
        shard = ExpertShard(0, held)
        return limit(plain, flags, cfg, factor=jnp.float32(1.5), shard=shard, seed=jnp.int32(0))

    taken = {}
    for policy in POLICIES:
        run = partial(jax.jit(partial(stage, cfg=CapacityConfig(policy=policy))), ids, scores)
        jax.block_until_ready(run())
        taken[policy] = statistics.median(best_of_two(run) for _ in range(rounds))
    return taken


def time_case(
    layer: Published, shape: Shape, timer: Timer, stage: dict[str, float], rounds: int
) -> dict[str, Any]:
    """Returns the figures of every setting (see ``timed``)."""
    loads = loads_of(layer, shape.tokens)
    runs = {name: timer.rank_runs(load.groups_RL) for name, load in loads.items()}
    wire = {name: load.seconds_on_wire(shape.model, timer.bandwidth) for name, load in loads.items()}
    slowest: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name in list(runs)[:: 1 if turn % 2 == 0 else -1]:
            slowest[name].append(max(best_of_two(run) for run in runs[name]))
    total = {
        name: [t + wire[name] + stage.get(name.split("/")[0], 0.0) for t in times]
        for name, times in slowest.items()
    }
    return {name: timed(name, slowest, total, wire, loads) for name in runs}


def timed(
    name: str, slowest: dict[str, list[float]], total: dict[str, list[float]], wire: dict[str, float],
    loads: dict[str, Load],
) -> dict[str, Any]:  # fmt: skip
    """Returns the figures of one setting. A speed-up is plain's time over its own, in each round."""
    ratios = [a / b for a, b in zip(total[BASELINE], total[name], strict=True)]
    experts = [a / b for a, b in zip(slowest[BASELINE], slowest[name], strict=True)]
    rows_R, plain_R = (loads[n].groups_RL.sum(1) for n in (name, BASELINE))
    return {
        "seconds": statistics.median(total[name]),
        "experts": statistics.median(slowest[name]),
        "wire": wire[name],
        "speedup": [statistics.median(ratios), min(ratios), max(ratios)],
        "experts_speedup": statistics.median(experts),
        "rows_ratio": float(plain_R.max() / rows_R.max()),
    }


def measure(routing: Path, gpu: bool, link_gbs: float, rounds: int) -> dict[str, Any]:
    """Returns the ``speed`` part of the results.

    routing: folder of the published routing.
    gpu: whether the sizes are the real ones, on an accelerator.
    link_gbs: GB/s that a rank sends and receives.
    rounds: number of rounds.
    """
    published, shapes = read_published(routing), REAL if gpu else SCALED
    platform = jax.default_backend()
    if gpu and platform == "cpu":
        raise SystemExit("--gpu: jax sees no accelerator here")
    cores = len(os.sched_getaffinity(0))
    start, cases, stages = time.perf_counter(), {}, {}
    for model, shape in shapes.items():
        dims = (shape.experts // RANKS + 1, shape.inner, shape.model)
        kernel, why = pick(platform, jnp.bfloat16, dims)
        mlp = jax.jit(partial(grouped_mlp, implementation=kernel))
        timer = Timer(weights_of(shape), mlp, link_gbs * 1e9, max(BUCKET, shape.tokens * shape.k // 16))
        print(f"{model}: {why}", flush=True)
        layers = {
            f"{domain}, layer {slot}": layer
            for domain in DOMAINS if (model, domain) in published
            for slot, layer in zip(SLOTS, published[model, domain], strict=True)
        } | {f"stated peak, {STATED_PEAK[model]:g} N": stated(model, shape)}  # fmt: skip
        stages[model] = time_stage(next(iter(layers.values())), shape, rounds)
        cases[model] = {}
        for name, layer in layers.items():
            cases[model][name] = time_case(layer, shape, timer, stages[model], rounds)
            print(f"{model} {name}: {time.perf_counter() - start:.0f} s", flush=True)
    return {
        "platform": platform,
        "device": f"{cores} CPU cores" if platform == "cpu" else jax.devices()[0].device_kind,
        "link_gbs": link_gbs,
        "rounds": rounds,
        "shapes": {model: vars(shape) for model, shape in shapes.items()},
        "stage": stages,
        "cases": cases,
        "seconds": round(time.perf_counter() - start),
    }
