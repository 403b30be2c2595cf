"""Expert offload on this machine's GPU: the link's bandwidth both ways of asking for it, and overlap.

A layer's experts lie in pinned host memory, a pool of slots on the device. **Copies**: experts brought to
slots by the jitted step (``jmoe.offload.copies``) and by the host (``jax.device_put`` and an install).
**Overlap**: a chain of layers that all need resident experts, with and without one prefetch a layer, which is
what a perfect forecast does; rows are chosen so that a layer takes at least as long as a copy, since a
shorter one cannot hide it.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import SingleDeviceSharding
from jmoe_kernels.grouped_mlp import ExpertWeights, grouped_mlp

from jmoe.offload.copies import copy_in, fetch, install
from jmoe.offload.table import Copies
from jmoe.param import HOST

LAYERS = 8  # of a chain
SLOTS = 5
MODELS = {"Qwen1.5-MoE": (60, 1408, 2048), "Mixtral-8x7B": (8, 14336, 4096)}  # experts, inner, model
TOY = {"toy": (3, 64, 64)}
TARGET = 1.10  # of a layer's time, with a prefetch at the same time


def offload(check: Any) -> None:
    """The section of ``gpu_check.py``: copies alone, then one during a layer. check: ``gpu_check.Check``."""
    for name, dims in (TOY if check.dry else MODELS).items():
        bench = Bench(dims, SLOTS, dry=check.dry)
        copy = {"in the step": bench.graph_seconds(), "by the host": bench.host_seconds()}
        for how, took in copy.items():
            rate = f"{bench.one_bytes / took / 1e9:.1f} GB/s"
            check.add("offload", f"{name}, one expert", how, took, verdict=rate)
        rows = bench.rows_for(copy["in the step"])
        alone, overlapped = (bench.chain_seconds(rows, prefetch=p) for p in (False, True))
        verdict = f"resident x{overlapped / alone:.2f}, target x{TARGET:.2f} "
        verdict += "pass" if overlapped <= TARGET * alone else "MISS"
        if alone < copy["in the step"]:
            verdict += "; the copy is longer than the layer"
        check.add("offload", f"{name}, {rows} rows", "layer, a prefetch", overlapped, verdict=verdict)


class Bench:
    """One layer's experts on both sides. dims: experts, inner, model."""

    def __init__(self, dims: tuple[int, int, int], slots: int, *, dry: bool):
        experts, inner, model = dims
        shapes = (experts, 2, inner, model), (experts, model, inner)
        dtype = jnp.float32 if dry else jnp.bfloat16
        device = jax.devices()[0]
        host = SingleDeviceSharding(device, memory_kind=HOST)
        self.numpy = [np.full(shape, 0.01, dtype) for shape in shapes]
        self.store = ExpertWeights(*(jax.device_put(a[None], host) for a in self.numpy))
        self.pool = ExpertWeights(*(jnp.zeros((slots + 1, *s[1:]), dtype) for s in shapes))
        self.dims, self.slots, self.dry, self.device = dims, slots, dry, device
        self.one_bytes = sum(a[0].nbytes for a in self.numpy)

    def graph_seconds(self) -> float:
        """Of one copy by the jitted step, of as many as there are slots in a row."""
        step = jax.jit(copy_in, donate_argnums=0)
        index = jnp.arange(self.slots, dtype=jnp.int32)
        moves = Copies(index % self.dims[0], index, jnp.int32(self.slots), jnp.int32(0))

        def run() -> ExpertWeights:
            self.pool = step(self.pool, self.store, moves)
            return self.pool

        return self._median(run) / self.slots

    def host_seconds(self) -> float:
        """The same by the host."""
        put = jax.jit(install, donate_argnums=0)

        def run() -> ExpertWeights:
            for slot in range(self.slots):
                one = ExpertWeights(
                    *(jax.device_put(a[slot % self.dims[0]][None], self.device) for a in self.numpy)
                )
                self.pool = put(self.pool, one, np.int32(slot))
            return self.pool

        return self._median(run) / self.slots

    def chain_seconds(self, rows: int, *, prefetch: bool) -> float:
        """Of one layer of a chain; with ``prefetch`` each brings an expert into the last slot meanwhile."""
        sizes = jnp.full(self.slots + 1, 0, jnp.int32).at[: self.slots - 1].set(rows // (self.slots - 1))

        @jax.jit
        def chain(x_ND: Array, pool: ExpertWeights, store: ExpertWeights) -> tuple[Array, Array]:
            for layer in range(LAYERS):
                one = fetch(store, jnp.int32(layer % self.dims[0])) if prefetch else None
                y_ND = grouped_mlp(x_ND.astype(pool.dtype), pool, sizes, platform=self.device.platform)
                x_ND = x_ND + y_ND
                if one is not None:
                    pool = install(pool, one, jnp.int32(self.slots - 1))
            return x_ND, pool.down_EDF[self.slots - 1, 0, 0]

        x_ND = jnp.full((rows, self.dims[2]), 0.01, jnp.float32)
        return self._median(lambda: chain(x_ND, self.pool, self.store)) / LAYERS

    def rows_for(self, seconds: float) -> int:
        """Rows with which a layer takes ``seconds`` or more, or 8192."""
        rows = self.slots - 1
        while rows < 8192 and not self.dry and self.chain_seconds(rows, prefetch=False) < seconds:
            rows *= 2
        return rows

    def _median(self, run: Callable[[], Any]) -> float:
        jax.block_until_ready(run())
        times = []
        for _ in range(1 if self.dry else 9):
            start = time.perf_counter()
            jax.block_until_ready(run())
            times.append(time.perf_counter() - start)
        return statistics.median(times)
