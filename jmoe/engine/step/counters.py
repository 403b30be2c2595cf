"""Counters of what the experts did: counted on the device inside the step, fetched when requested."""

from dataclasses import dataclass
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from jmoe.config.counters import ASSIGNMENTS, COUNTERS, MEANS, names
from jmoe.config.model import ModelConfig
from jmoe.config.techniques import Phase
from jmoe.mesh import TENSOR
from jmoe.moe.types import DispatchStats

PHASES: tuple[Phase, ...] = get_args(Phase)
SUMS = tuple(counter for counter in COUNTERS if counter is not ASSIGNMENTS)
# Rows of statistics have always begun with these, and people read them as text; other counters follow.
FIRST = (
    "active_experts", "active_experts_baseline", "assignments", "dropped", "rerouted", "remapped",
    "lost_assignments", "max_over_mean_load",
)  # fmt: skip


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Count64:
    """64-bit counts in two uint32 halves, as jax has no wider integers by default.

    256 ranks of 8192 tokens, 8 experts each, are 2^24 assignments per layer and step: an int32 sum would
    overflow after 128 steps, and device counters are drained only every few thousand steps.
    """

    low: Array
    high: Array

    @classmethod
    def zeros(cls, *shape: int) -> "Count64":
        return cls(jnp.zeros(shape, jnp.uint32), jnp.zeros(shape, jnp.uint32))

    def plus(self, amount: Array) -> "Count64":
        """Returns the counts with an amount added.

        amount: int32 numbers that are not negative.
        """
        low = self.low + amount.astype(jnp.uint32)  # if it wraps, it is below the old value
        return Count64(low, self.high + (low < self.low).astype(jnp.uint32))

    def to_host(self) -> np.ndarray:
        """Returns the counts as int64, on the host."""
        low, high = jax.device_get((self.low, self.high))
        return low.astype(np.int64) + (high.astype(np.int64) << 32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MoETotals:
    """Sums over the steps of one phase; one row per MoE layer.

    counts_LE: assignments to each expert.
    active_L: number of experts with at least one assignment.
    plain_active_L: number of experts that plain top-k would have used.
    load_L: load of the most loaded expert over the mean load.
    sums_L: counters of ``SUMS`` by name; zeros if nothing counts them.
    steps: number of steps summed.
    """

    counts_LE: Count64
    active_L: Array
    plain_active_L: Array
    load_L: Array
    sums_L: dict[str, Count64]
    steps: Array


def zero_totals(layers: int, experts: int) -> MoETotals:
    def mean() -> Array:
        return jnp.zeros(layers, jnp.float32)

    return MoETotals(
        counts_LE=Count64.zeros(layers, experts),
        active_L=mean(), plain_active_L=mean(), load_L=mean(),
        sums_L={name: Count64.zeros(layers) for name in names(SUMS)},
        steps=jnp.zeros((), jnp.int32),
    )  # fmt: skip


def add_step(totals: MoETotals, layers: list[DispatchStats]) -> MoETotals:
    """Returns the totals with one step's layers added; a step without a valid token (in warm-up) is not
    counted."""
    counts_LE = jnp.stack([layer.counts_E for layer in layers])
    plain_LE = jnp.stack([layer.plain_counts_E for layer in layers])
    step_L: dict[str, Array] = jax.tree.map(lambda *each: jnp.stack(each), *[layer.sums for layer in layers])
    has_tokens = jnp.any(counts_LE > 0)
    padded = [counter.name for counter in SUMS if counter.is_padded and counter.name in step_L]
    step_L |= {name: jnp.where(has_tokens, step_L[name], 0) for name in padded}
    loads_LE = counts_LE.astype(jnp.float32)
    mean_L = jnp.maximum(jnp.mean(loads_LE, axis=1), 1e-9)
    return MoETotals(
        totals.counts_LE.plus(counts_LE),
        totals.active_L + jnp.sum(counts_LE > 0, axis=1, dtype=jnp.float32),
        totals.plain_active_L + jnp.sum(plain_LE > 0, axis=1, dtype=jnp.float32),
        totals.load_L + jnp.max(loads_LE, axis=1) / mean_L,
        totals.sums_L | {name: totals.sums_L[name].plus(amount_L) for name, amount_L in step_L.items()},
        totals.steps + has_tokens.astype(jnp.int32),
    )


def transported_bytes(cfg: ModelConfig, mesh: Mesh) -> int:
    """Returns the bytes to send one row to another rank, in the weights' dtype, and back, in float32, summed
    over its copies, one per tensor rank."""
    return cfg.hidden_size * (jnp.dtype(cfg.dtype).itemsize + 4) * mesh.shape[TENSOR]


class MoECounters:
    """Host-side sums of drained device totals: 64 bits, so that a long run cannot overflow.

    row_bytes: bytes to send one row between ranks, see ``transported_bytes``.
    expert_bytes: bytes to copy one expert.
    """

    def __init__(self, layers: int, experts: int, row_bytes: int, expert_bytes: int):
        self.units = {"one": 1, "row": row_bytes, "expert": expert_bytes}
        self.counts_LE = np.zeros((layers, experts), np.int64)
        self.active_L, self.plain_active_L, self.load_L = (np.zeros(layers) for _ in range(3))
        self.sums_L = {name: np.zeros(layers, np.int64) for name in names(SUMS)}
        self.steps = 0

    def drain(self, totals: MoETotals) -> None:
        host = jax.device_get(totals)
        self.counts_LE += host.counts_LE.to_host()
        self.active_L += host.active_L
        self.plain_active_L += host.plain_active_L
        self.load_L += host.load_L
        for name, sum_L in self.sums_L.items():
            sum_L += host.sums_L[name].to_host()
        self.steps += int(host.steps)

    def report(self) -> dict[str, Any]:
        """Returns JSON-able per-step means and totals, overall and by layer.

        They are an interface (``jmoe eval --json``). Any ``lost_assignments`` but 0 means wrong answers.
        """
        means_LM = np.stack([self.active_L, self.plain_active_L, self.load_L], 1)
        sums_L = self.sums_L | {ASSIGNMENTS.name: self.counts_LE.sum(1)}
        sums_LC = np.stack([sums_L[name] for name in names(COUNTERS)], 1)
        layers = [self._row(*row) for row in zip(means_LM, sums_LC, strict=True)]
        overall = self._row(means_LM.sum(0) / max(len(layers), 1), sums_LC.sum(0))
        return {"steps": self.steps, **overall, "per_layer": layers}

    def _row(self, means_M: np.ndarray, sums_C: np.ndarray) -> dict[str, Any]:
        steps = max(self.steps, 1)
        row = {name: mean / steps for name, mean in zip(MEANS, means_M.tolist(), strict=True)}
        row |= {c.name: n * self.units[c.unit] for c, n in zip(COUNTERS, sums_C.tolist(), strict=True)}
        return {name: row[name] for name in (*FIRST, *row)}
