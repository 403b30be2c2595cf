"""What the experts did, counted on the device inside the step and fetched when asked."""

from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from jmoe.config.model import ModelConfig
from jmoe.mesh import TENSOR
from jmoe.moe.types import CacheCounts, DispatchStats

PHASES = ("prefill", "decode")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Count64:
    """64-bit counts in two uint32 halves, as jax has no wider integers by default.

    256 ranks of 8192 tokens, 8 experts each, are 2^24 assignments a layer and step: an int32 sum would be
    full after 128 steps, and device counters are drained only every few thousand.
    """

    low: Array
    high: Array

    @classmethod
    def zeros(cls, *shape: int) -> "Count64":
        return cls(jnp.zeros(shape, jnp.uint32), jnp.zeros(shape, jnp.uint32))

    def plus(self, amount: Array) -> "Count64":
        """amount: int32, not negative."""
        low = self.low + amount.astype(jnp.uint32)  # wraps, and is then below what it was
        return Count64(low, self.high + (low < self.low).astype(jnp.uint32))

    def fetched(self) -> np.ndarray:
        """int64, on the host."""
        low, high = jax.device_get((self.low, self.high))
        return low.astype(np.int64) + (high.astype(np.int64) << 32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MoETotals:
    """Sums over the steps of one phase; one row a MoE layer.

    counts_LE: assignments to each expert. active_L, plain_active_L, load_L: sums over steps of the experts
    with at least one assignment, of those that plain top-k would have used, and of the most loaded expert's
    load over the mean. remote_L: assignments to another rank's experts. remapped_L; dropped_L, rerouted_L:
    those that binning, or a capacity, took from the expert they chose. lost_L: those that no expert was
    given, which must be 0. useful_L, sent_L: rows between ranks, see ``Traffic``. cache_L: what the expert
    cache did, by the names of ``CacheCounts``; zeros without one. steps: steps summed.
    """

    counts_LE: Count64
    active_L: Array
    plain_active_L: Array
    load_L: Array
    remote_L: Count64
    remapped_L: Count64
    dropped_L: Count64
    rerouted_L: Count64
    lost_L: Count64
    useful_L: Count64
    sent_L: Count64
    cache_L: dict[str, Count64]
    steps: Array


def zero_totals(layers: int, experts: int) -> MoETotals:
    def mean() -> Array:
        return jnp.zeros(layers, jnp.float32)

    def rows() -> Count64:
        return Count64.zeros(layers)

    return MoETotals(
        counts_LE=Count64.zeros(layers, experts),
        active_L=mean(), plain_active_L=mean(), load_L=mean(),
        remote_L=rows(), remapped_L=rows(), dropped_L=rows(), rerouted_L=rows(),
        lost_L=rows(), useful_L=rows(), sent_L=rows(),
        cache_L={field.name: rows() for field in fields(CacheCounts)},
        steps=jnp.zeros((), jnp.int32),
    )  # fmt: skip


def add_step(totals: MoETotals, layers: list[DispatchStats]) -> MoETotals:
    """The totals with one step's layers added; a step without a valid token (warm-up's) counts as none."""
    step = jax.tree.map(lambda *values: jnp.stack(values), *layers)
    counts_LE = step.counts_E
    counts = jnp.any(counts_LE > 0)
    loads_LE = counts_LE.astype(jnp.float32)
    mean_L = jnp.maximum(jnp.mean(loads_LE, axis=1), 1e-9)
    cache_L = totals.cache_L
    if step.cache is not None:
        told_L = {name: jnp.where(counts, getattr(step.cache, name), 0) for name in cache_L}
        cache_L = {name: total.plus(told_L[name]) for name, total in cache_L.items()}
    return MoETotals(
        totals.counts_LE.plus(counts_LE),
        totals.active_L + jnp.sum(counts_LE > 0, axis=1, dtype=jnp.float32),
        totals.plain_active_L + jnp.sum(step.plain_E > 0, axis=1, dtype=jnp.float32),
        totals.load_L + jnp.max(loads_LE, axis=1) / mean_L,
        totals.remote_L.plus(step.remote),
        totals.remapped_L.plus(step.remapped),
        totals.dropped_L.plus(step.dropped),
        totals.rerouted_L.plus(step.rerouted),
        totals.lost_L.plus(jnp.stack([layer.lost for layer in layers])),
        totals.useful_L.plus(step.traffic.useful),
        totals.sent_L.plus(jnp.where(counts, step.traffic.sent, 0)),
        cache_L,
        totals.steps + counts.astype(jnp.int32),
    )


def transported_bytes(cfg: ModelConfig, mesh: Mesh) -> int:
    """Bytes of one row's way to another rank, in the weights' dtype, and back, in float32; of all its copies,
    one a tensor rank."""
    return cfg.hidden_size * (jnp.dtype(cfg.dtype).itemsize + 4) * mesh.shape[TENSOR]


def expert_bytes(cfg: ModelConfig, parts: int = 1) -> int:
    """Bytes of one routed expert; of what a device has of one that is split over ``parts`` of them."""
    inner, model = cfg.moe_intermediate_size // parts, cfg.hidden_size
    numbers = 3 * inner * model + (2 * inner + model if cfg.expert_bias else 0)
    return numbers * jnp.dtype(cfg.dtype).itemsize


class MoECounters:
    """Host-side sums of drained device totals: 64 bits, so that a long run cannot overflow.

    row_bytes: what a row between ranks weighs, see ``transported_bytes``. one_expert: bytes of a copy.
    """

    def __init__(self, layers: int, experts: int, row_bytes: int, one_expert: int):
        self.row_bytes, self.one_expert = row_bytes, one_expert
        self.counts_LE = np.zeros((layers, experts), np.int64)
        self.active_L, self.plain_active_L, self.load_L = (np.zeros(layers) for _ in range(3))
        self.remote_L, self.remapped_L = (np.zeros(layers, np.int64) for _ in range(2))
        self.dropped_L, self.rerouted_L, self.lost_L = (np.zeros(layers, np.int64) for _ in range(3))
        self.useful_L, self.sent_L = (np.zeros(layers, np.int64) for _ in range(2))
        self.cache = {field.name: np.zeros(layers, np.int64) for field in fields(CacheCounts)}
        self.steps = 0

    def drain(self, totals: MoETotals) -> None:
        host = jax.device_get(totals)
        self.counts_LE += host.counts_LE.fetched()
        self.active_L += host.active_L
        self.plain_active_L += host.plain_active_L
        self.load_L += host.load_L
        self.remote_L += host.remote_L.fetched()
        self.remapped_L += host.remapped_L.fetched()
        self.dropped_L += host.dropped_L.fetched()
        self.rerouted_L += host.rerouted_L.fetched()
        self.lost_L += host.lost_L.fetched()
        self.useful_L += host.useful_L.fetched()
        self.sent_L += host.sent_L.fetched()
        for name, total_L in self.cache.items():
            total_L += host.cache_L[name].fetched()
        self.steps += int(host.steps)

    def report(self) -> dict[str, Any]:
        """Per-step means and totals, overall and by layer, JSON-able (interface: ``jmoe eval --json``).

        assignments are those that were sent to experts, lost_assignments those of them that no expert was
        given: anything but 0 means wrong answers. expert_cache_*, prefetch*: of offloaded experts, see
        ``CacheCounts``, over all ranks; zeros where all are on the device.
        """
        means = np.stack([self.active_L, self.plain_active_L, self.load_L], 1)
        changed = self.remapped_L, self.dropped_L, self.rerouted_L, self.lost_L
        moved = self.remote_L, self.useful_L, self.sent_L
        sums = np.stack([self.counts_LE.sum(1), *changed, *moved, *self.cache.values()], 1)
        layers = [self._row(*row) for row in zip(means, sums, strict=True)]
        overall = self._row(means.sum(0) / max(len(layers), 1), sums.sum(0))
        return {"steps": self.steps, **overall, "per_layer": layers}

    def _row(self, means: np.ndarray, sums: np.ndarray) -> dict[str, Any]:
        active, plain_active, load = means.tolist()
        assignments, remapped, dropped, rerouted, lost, remote, useful, sent, *cache = sums.tolist()
        hits, misses, evicted, copied, prefetched, prefetched_useful = cache
        steps = max(self.steps, 1)
        return {
            "active_experts": active / steps,
            "active_experts_baseline": plain_active / steps,
            "assignments": assignments,
            "dropped": dropped,
            "rerouted": rerouted,
            "remapped": remapped,
            "lost_assignments": lost,
            "max_over_mean_load": load / steps,
            "remote_assignments": remote,
            "transport_bytes": sent * self.row_bytes,
            "transport_useful_bytes": useful * self.row_bytes,
            "expert_cache_hits": hits,
            "expert_cache_misses": misses,
            "expert_cache_evictions": evicted,
            "bytes_host_to_device": copied * self.one_expert,
            "prefetch_bytes": prefetched * self.one_expert,
            "prefetch_useful_bytes": prefetched_useful * self.one_expert,
        }
