"""The facts about each platform for kernels and engine: one record per platform, which everyone reads.

A new platform needs one record here, and its kernels lie in the folders of what they compute. This module
needs no jax.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

ExpertKernel = Literal["xla", "pallas_tpu", "pallas_gpu", "cpu", "batched", "reference"]
DenseKernel = Literal["xla", "cpu"]
AttentionKernel = Literal["xla", "cpu", "tpu", "gpu"]
BinningKernel = Literal["xla", "pallas_tpu", "pallas_gpu"]
RotationKernel = Literal["xla", "cpu"]
Executor = Literal["graph", "host"]
Name = TypeVar("Name", bound=str)


@dataclass(frozen=True)
class Backend:
    """The facts about one platform. The defaults hold for a platform of which only XLA is known.

    name: name of the platform, as jax spells it.
    experts: implementations of the experts' grouped MLP in order of preference; the last of them runs
        anywhere.
    attention: implementations of paged attention in order of preference; the last of them runs anywhere.
    binning: implementations of binning in order of preference; the last of them runs anywhere.
    dense: implementation of dense products if the experts run in the first of ``experts``; XLA if they do
        not.
    rotation: kernel that norms and rotates queries and keys if the experts run in the first of ``experts``;
        XLA if they do not, or if there is none.
    bfloat16_storage: dtype in which stacks of weights and the KV cache store bfloat16 numbers.
    why_weight_storage: reason for ``bfloat16_storage`` of weights if it is another dtype, for a person.
    why_cache_storage: likewise for the KV cache.
    num_row_tokens: number of tokens in one row of a prompt.
    executor: what runs the steps of a model with offloaded experts on one device.
    why_executor: reason for ``executor``, for a person.
    has_one_library: whether one library has the kernels of experts, dense products and attention.
    has_batched_bfloat16: whether the platform multiplies stacks of bfloat16 matrices.
    has_ragged_exchange: whether the platform has XLA's ``ragged_all_to_all``.
    has_host_memory: whether the devices' memory is the host's, which all of them share.
    has_parallel_copies: whether a copy from the host inside a step proceeds while the device computes.
    """

    name: str
    experts: tuple[ExpertKernel, ...] = ("xla",)
    attention: tuple[AttentionKernel, ...] = ("xla",)
    binning: tuple[BinningKernel, ...] = ("xla",)
    dense: DenseKernel = "xla"
    rotation: RotationKernel = "xla"
    bfloat16_storage: Literal["bfloat16", "uint16"] = "bfloat16"
    why_weight_storage: str = "as the platform stores bfloat16"
    why_cache_storage: str = "as the platform stores bfloat16"
    num_row_tokens: int = 64
    executor: Executor = "graph"
    why_executor: str = "one compiled step; driving each layer from the host takes longer on a CPU"
    has_one_library: bool = False
    has_batched_bfloat16: bool = True
    has_ragged_exchange: bool = True
    has_host_memory: bool = False
    has_parallel_copies: bool = False


CPU = Backend(
    name="cpu",
    experts=("cpu", "xla"),
    attention=("cpu", "xla"),
    dense="cpu",
    rotation="cpu",
    bfloat16_storage="uint16",  # XLA:CPU converts a whole bfloat16 stack to read or update a part of it
    why_weight_storage="XLA:CPU would convert every expert of a sliced bfloat16 stack",
    why_cache_storage="XLA:CPU updates a bfloat16 array by copying it",
    has_one_library=True,
    has_batched_bfloat16=False,  # XLA:CPU has no product of bfloat16 matrices head by head
    has_ragged_exchange=False,
    has_host_memory=True,
)
TPU = Backend(
    name="tpu",
    experts=("pallas_tpu", "xla"),
    attention=("tpu", "xla"),
    binning=("pallas_tpu", "xla"),
    why_executor="the compiler makes a prefetch an asynchronous copy beside the experts",
    has_parallel_copies=True,  # as its compiler's output shows
)
GPU = Backend(
    name="gpu",
    experts=("pallas_gpu", "xla"),
    attention=("gpu", "xla"),
    binning=("pallas_gpu", "xla"),
    num_row_tokens=256,  # a shorter row pads less, but attention reads a whole page table per row
    executor="host",
    why_executor="a GPU's compiler makes no asynchronous copies of slices inside a step; device_put does",
)
BACKENDS = {backend.name: backend for backend in (CPU, TPU, GPU)}


def get_backend(platform: str) -> Backend:
    """Returns the platform's record, or the defaults if the platform is unknown."""
    return BACKENDS.get(platform) or Backend(platform)


def home_of(implementation: str) -> str | None:
    """Returns the only platform that lists this implementation, or None if not exactly one does."""
    homes = [b.name for b in BACKENDS.values() if implementation in (*b.experts, *b.attention, *b.binning)]
    return homes[0] if len(homes) == 1 else None


def first_supported(
    names: tuple[Name, ...], why_not: Callable[[Name], str | None], describe: Callable[[Name], str]
) -> tuple[Name, str]:
    """Returns the first of ``names`` that can run, and why. The last name runs anywhere and is not checked.

    why_not: function that returns why an implementation cannot run, or None if it can.
    describe: function that returns what an implementation is; it is the reason for one that can run.
    """
    *candidates, portable = names
    why = "portable XLA"
    for name in candidates:
        if (reason := why_not(name)) is None:
            return name, describe(name)
        why = f"portable XLA: {reason}"
    return portable, why
