"""What the experts did, counted on the device inside the step and fetched when asked."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jmoe.moe.types import DispatchStats

PHASES = ("prefill", "decode")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MoETotals:
    """Sums over the steps of one phase; one row a MoE layer.

    counts_LE: assignments to each expert. active_L, load_L: sums over steps of the experts with at least
    one assignment, and of the most loaded expert's load over the mean. remote_L: assignments to another
    rank's experts. steps: steps summed.
    """

    counts_LE: Array
    active_L: Array
    load_L: Array
    remote_L: Array
    steps: Array


def zero_totals(layers: int, experts: int) -> MoETotals:
    zeros = jnp.zeros(layers, jnp.float32)
    counts = jnp.zeros((layers, experts), jnp.int32)
    return MoETotals(counts, zeros, zeros.copy(), jnp.zeros(layers, jnp.int32), jnp.zeros((), jnp.int32))


def add_step(totals: MoETotals, layers: list[DispatchStats]) -> MoETotals:
    """The totals with one step's layers added; a step without a valid token counts as none."""
    counts_LE = jnp.stack([layer.counts_E for layer in layers])
    loads_LE = counts_LE.astype(jnp.float32)
    mean_L = jnp.maximum(jnp.mean(loads_LE, axis=1), 1e-9)
    return MoETotals(
        totals.counts_LE + counts_LE,
        totals.active_L + jnp.sum(counts_LE > 0, axis=1, dtype=jnp.float32),
        totals.load_L + jnp.max(loads_LE, axis=1) / mean_L,
        totals.remote_L + jnp.stack([layer.remote for layer in layers]),
        totals.steps + jnp.any(counts_LE > 0).astype(jnp.int32),
    )


class MoECounters:
    """Host-side sums of drained device totals: 64 bits, so that a long run cannot overflow."""

    def __init__(self, layers: int, experts: int):
        self.counts_LE = np.zeros((layers, experts), np.int64)
        self.active_L, self.load_L = np.zeros(layers), np.zeros(layers)
        self.remote_L = np.zeros(layers, np.int64)
        self.steps = 0

    def drain(self, totals: MoETotals) -> None:
        host = jax.device_get(totals)
        self.counts_LE += host.counts_LE
        self.active_L += host.active_L
        self.load_L += host.load_L
        self.remote_L += host.remote_L
        self.steps += int(host.steps)

    def report(self) -> dict[str, Any]:
        """Per-step means and totals, overall and by layer, JSON-able (interface: ``jmoe eval --json``).

        Routing is lossless here, so dropped, rerouted and remapped are zero and the baseline equals the
        active experts; all experts are resident, so no expert crosses from host to device.
        """
        layers = [self._row(*row) for row in zip(
            self.counts_LE.sum(1), self.active_L, self.load_L, self.remote_L, strict=True
        )]  # fmt: skip
        n = max(len(layers), 1)
        overall = self._row(
            self.counts_LE.sum(), self.active_L.sum() / n, self.load_L.sum() / n, self.remote_L.sum()
        )
        return {"steps": self.steps, **overall, "per_layer": layers}

    def _row(self, assignments: Any, active: Any, load: Any, remote: Any) -> dict[str, Any]:
        steps = max(self.steps, 1)
        return {
            "active_experts": float(active / steps),
            "active_experts_baseline": float(active / steps),
            "assignments": int(assignments),
            "dropped": 0,
            "rerouted": 0,
            "remapped": 0,
            "max_over_mean_load": float(load / steps),
            "remote_assignments": int(remote),
            "expert_cache_hits": 0,
            "expert_cache_misses": 0,
            "bytes_host_to_device": 0,
        }
