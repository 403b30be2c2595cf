"""Measures expert offload on this machine's GPU: the link's bandwidth for two ways to copy, and overlap.

A layer's experts are in pinned host memory, and a pool of slots is on the device. **Copies**: the jitted step
(``jmoe.offload.copies``) and the host (``jax.device_put`` and an install) each copy experts to slots.
**Overlap**: a chain of layers runs, all of which need resident experts, with and without one prefetch a
layer; a perfect forecast makes exactly these prefetches. The number of rows is chosen so that a layer takes
at least as long as a copy, because a shorter layer cannot hide the copy.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_checks.rows import Check
from jax import Array
from jax.sharding import SingleDeviceSharding
from jmoe_kernels.grouped_mlp import ExpertWeights, grouped_mlp
from jmoe_kernels.quantised import as_float
from shared.layer_sizes import layer_sizes

from jmoe.offload.copies import copy_in, fetch, install
from jmoe.offload.slot_table import Copies
from jmoe.param import HOST

LAYERS = 8  # layers of a chain
SLOTS = 5
MODELS = {
    "Qwen1.5-MoE": layer_sizes("qwen1.5-moe-a2.7b").dims,
    "Mixtral-8x7B": layer_sizes("mixtral-8x7b").dims,
}
TOY = {"toy": (3, 64, 64)}  # experts, inner, model
TARGET = 1.10  # a layer's time with a prefetch at the same time, over its time alone


def offload(check: Check) -> None:
    """Runs this section of ``gpu_check.py``: copies alone, then one copy during a layer.

    check: ``rows.Check``, which gets the rows.
    """
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
    """The experts of one layer on the host and on the device.

    dims: number of experts, the inner width and the model's width.
    slots: number of slots of the pool.
    dry: whether the measurement runs only once, in float32.
    """

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
        """Returns the seconds of one copy by the jitted step, which makes one for each slot in a row."""
        step = jax.jit(copy_in, donate_argnums=0)
        index = jnp.arange(self.slots, dtype=jnp.int32)
        moves = Copies(index % self.dims[0], index, jnp.int32(self.slots), jnp.int32(0))

        def run() -> ExpertWeights:
            self.pool = step(self.pool, self.store, moves)
            return self.pool

        return self._median(run) / self.slots

    def host_seconds(self) -> float:
        """Returns the seconds of one copy by the host, which makes one for each slot in a row."""
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
        """Returns the seconds of one layer of a chain.

        rows: number of rows.
        prefetch: whether each layer also copies an expert into the last slot at the same time.
        """
        sizes = jnp.full(self.slots + 1, 0, jnp.int32).at[: self.slots - 1].set(rows // (self.slots - 1))

        @jax.jit
        def chain(x_ND: Array, pool: ExpertWeights, store: ExpertWeights) -> tuple[Array, Array]:
            for layer in range(LAYERS):
                one = fetch(store, jnp.int32(layer % self.dims[0])) if prefetch else None
                y_ND = grouped_mlp(x_ND.astype(pool.dtype), pool, sizes, platform=self.device.platform)
                x_ND = x_ND + y_ND
                if one is not None:
                    pool = install(pool, one, jnp.int32(self.slots - 1))
            return x_ND, as_float(pool.down_EDF)[self.slots - 1, 0, 0]

        x_ND = jnp.full((rows, self.dims[2]), 0.01, jnp.float32)
        return self._median(lambda: chain(x_ND, self.pool, self.store)) / LAYERS

    def rows_for(self, seconds: float) -> int:
        """Returns a number of rows with which a layer takes ``seconds`` or more, or 8192."""
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
