"""The only place that makes meshes. Axes have names: ``data``, ``expert``, ``tensor``.

``data``    each group of ranks along it holds a whole copy of the weights and its own tokens.
``expert``  experts are split over it. Each rank holds its own sequences (attention "dp") or its own heads of
            its data group's sequences (attention "tp", see ``Split``).
``tensor``  attention heads and the experts' inner dimension are split over it.

A weight declares the mesh axis of each of its dimensions when it is made (``nnx.Param(..., axes=...)``). That
one declaration gives its sharding in memory, in a checkpoint and under ``shard_map``.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jmoe.config.choices import AttentionSplit

DATA, EXPERT, TENSOR = "data", "expert", "tensor"
THREADS = 4  # threads of XLA's CPU client per emulated device
TOKENS = (DATA, EXPERT)  # the axes over which tokens are split between the blocks of a layer


def make_mesh(data: int = 1, expert: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Makes a mesh of ``data * expert * tensor`` devices; raises ValueError if there are not enough devices.

    devices: None takes the devices of all processes in jax's order, and raises if a process would have none.
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
    """Gives emulated CPU devices the threads that their collectives need. It must be called before jax makes
    them.

    XLA's CPU client has as many threads as there are cores or devices, whichever is more, and a collective
    blocks one thread per device. A step has collectives that do not wait for one another: some of them can
    take all threads while a device that they wait for has none. XLA then ends the process after 40 seconds.
    NPROC is XLA's own variable for the number of threads; a value that is already set is kept.
    """
    devices: int = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]
    if devices > 1:
        os.environ.setdefault("NPROC", str(THREADS * devices))


@dataclass(frozen=True)
class Split:
    """The split of attention over a mesh.

    sequences: mesh axes over which sequences are split.
    heads: mesh axes over which the heads of a sequence are split.
    """

    mesh: Mesh
    sequences: tuple[str, ...]
    heads: tuple[str, ...]

    @property
    def sequence_ranks(self) -> int:
        """The number of ranks, or groups of ranks, that hold their own sequences."""
        return math.prod(self.mesh.shape[axis] for axis in self.sequences)

    @property
    def head_ranks(self) -> int:
        """The number of ranks that share the heads of a sequence."""
        return math.prod(self.mesh.shape[axis] for axis in self.heads)


def split_attention(mesh: Mesh, attention: AttentionSplit) -> Split:
    """Returns the split of attention.

    attention: "dp": each rank of the expert axis has its own sequences. "tp": the ranks of the expert axis
        share the heads of the same sequences.
    """
    return Split(mesh, TOKENS, (TENSOR,)) if attention == "dp" else Split(mesh, (DATA,), (EXPERT, TENSOR))


def sharding(mesh: Mesh, *axes: str | tuple[str, ...] | None) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*axes))


def replicated(outputs: Any, mesh: Mesh) -> Any:
    """Replicates ``outputs`` on every device, so that every host can read them. The function is for use under
    jit."""
    return outputs if is_single(mesh) else lax.with_sharding_constraint(outputs, sharding(mesh))


def check_divides(name: str, size: int, axis: str, num_parts: int) -> None:
    """Raises a ValueError that lists the divisors, unless ``size`` splits evenly over ``num_parts``."""
    if size % num_parts:
        small = [d for d in range(1, math.isqrt(size) + 1) if size % d == 0]
        divisors = sorted({*small, *(size // d for d in small)})
        raise ValueError(
            f"{axis} parallel size {num_parts} does not divide {name} {size}; it can be one of {divisors}"
        )


def platform_of(mesh: Mesh) -> str:
    """Returns the kind of the mesh's devices ("cpu", "gpu", "tpu"), which need not be jax's default
    backend."""
    return mesh.devices.flat[0].platform


def is_single(mesh: Mesh) -> bool:
    return math.prod(mesh.shape.values()) == 1
