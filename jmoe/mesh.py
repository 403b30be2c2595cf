"""The only maker of meshes. Axes are words: ``data``, ``expert``, ``tensor``.

``data``    whole replicas of the layer's tokens and weights.
``expert``  experts are split over it; each rank holds its own sequences (attention "dp") or its own heads
            of its data group's (attention "tp", see ``Split``).
``tensor``  attention heads and the experts' inner dimension are split over it.

A weight declares the axis of each of its dimensions when it is made (``nnx.Param(..., axes=...)``); that
one declaration gives its sharding in memory, in a checkpoint and under ``shard_map``.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA, EXPERT, TENSOR = "data", "expert", "tensor"
THREADS = 4  # of XLA's CPU client for each emulated device
TOKENS = (DATA, EXPERT)  # the axes over which tokens are split between the blocks of a layer


def make_mesh(data: int = 1, expert: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of ``data * expert * tensor`` devices; raises ValueError where that many are not there.

    devices: None takes those of all processes, in jax's order, and leaves no process without one.
    """
    for name, size in ((DATA, data), (EXPERT, expert), (TENSOR, tensor)):
        if size < 1:
            raise ValueError(f"{name} parallel size must be at least 1, got {size}")
    everyone = devices is None
    if devices is None:
        give_threads()
        devices = jax.devices()
    need = data * expert * tensor
    if need > len(devices):
        raise ValueError(
            f"a mesh of data {data} x expert {expert} x tensor {tensor} needs {need} devices, "
            f"{len(devices)} present (JAX_NUM_CPU_DEVICES={need} emulates them on a CPU)"
        )
    if everyone and (idle := {d.process_index for d in devices} - {d.process_index for d in devices[:need]}):
        raise ValueError(
            f"a mesh of data {data} x expert {expert} x tensor {tensor} takes {need} of {len(devices)} "
            f"devices and leaves process {min(idle)} of {jax.process_count()} without any"
        )
    grid = np.asarray(devices[:need]).reshape(data, expert, tensor)
    return Mesh(grid, (DATA, EXPERT, TENSOR), axis_types=(AxisType.Auto,) * 3)


def give_threads() -> None:
    """Gives emulated CPU devices the threads that their collectives need. Call it before jax makes them.

    XLA's CPU client has as many threads as there are cores or devices, whichever are more, and a collective
    blocks one of them for each device. A step has collectives that do not wait for one another: some of them
    can take all threads while a device that they wait for has none. XLA then ends the process after 40
    seconds. NPROC is its own variable for the number of threads; one that is set already stays.
    """
    devices: int = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]
    if devices > 1:
        os.environ.setdefault("NPROC", str(THREADS * devices))


@dataclass(frozen=True)
class Split:
    """How attention is split over a mesh: sequences over some of its axes, heads over the others."""

    mesh: Mesh
    sequences: tuple[str, ...]
    heads: tuple[str, ...]

    @property
    def sequence_ranks(self) -> int:
        """How many ranks, or groups of them, hold sequences of their own."""
        return math.prod(self.mesh.shape[axis] for axis in self.sequences)

    @property
    def head_ranks(self) -> int:
        """How many ranks share the heads of a sequence."""
        return math.prod(self.mesh.shape[axis] for axis in self.heads)


def split_attention(mesh: Mesh, attention: Literal["dp", "tp"]) -> Split:
    """dp: each rank of the expert axis has sequences of its own. tp: it shares their heads."""
    return Split(mesh, TOKENS, (TENSOR,)) if attention == "dp" else Split(mesh, (DATA,), (EXPERT, TENSOR))


def sharding(mesh: Mesh, *axes: str | tuple[str, ...] | None) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*axes))


def check_divides(what: str, size: int, axis: str, parts: int) -> None:
    """Raises ValueError, listing the divisors, unless ``size`` splits evenly over ``parts``."""
    if size % parts:
        small = [d for d in range(1, math.isqrt(size) + 1) if size % d == 0]
        divisors = sorted({*small, *(size // d for d in small)})
        raise ValueError(
            f"{axis} parallel size {parts} does not divide {what} {size}; it can be one of {divisors}"
        )


def platform_of(mesh: Mesh) -> str:
    """The kind of the mesh's devices ("cpu", "gpu", "tpu"), which need not be jax's default backend."""
    return mesh.devices.flat[0].platform


def is_single(mesh: Mesh) -> bool:
    return math.prod(mesh.shape.values()) == 1
