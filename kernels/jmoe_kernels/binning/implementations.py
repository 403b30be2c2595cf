"""The implementations of binning in one call: one record each, which ``api`` reads.

A new one needs its name in ``BinningKernel``, its file in this folder, and its record here. The Pallas
modules are imported when they are needed.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jmoe_kernels.backends import BinningKernel
from jmoe_kernels.binning.reference import bin_experts_reference
from jmoe_kernels.binning.types import Binned, Rule
from jmoe_kernels.lazy import LazyFunction

PALLAS_TPU = "jmoe_kernels.binning.pallas_tpu"
PALLAS_GPU = "jmoe_kernels.binning.pallas_gpu"


@dataclass(frozen=True)
class Implementation:
    """One way to bin. The defaults hold for one that runs anywhere, on any batch.

    run: function (logits_TE, valid_T, lossy_T, rule, renormalize=, total=) that does the work of
        ``api.bin_experts``; one with an interpreter takes (interpret=) too.
    limit: function (experts, rule) that returns the limit that they exceed, or None.
    most_tokens: function (experts, k) that returns the largest number of tokens of a call; None if there is
        no limit.
    describe: function that returns what it is, in a few words for a person.
    has_interpreter: whether it has an interpreter, which runs on any platform.
    """

    run: Callable[..., Binned]
    limit: Callable[[int, Rule], str | None] = lambda experts, rule: None
    most_tokens: Callable[[int, int], int] | None = None
    describe: Callable[[], str] = lambda: "portable XLA"
    has_interpreter: bool = False


IMPLEMENTATIONS: dict[BinningKernel, Implementation] = {
    "xla": Implementation(bin_experts_reference),
    "pallas_tpu": Implementation(
        LazyFunction(PALLAS_TPU, "bin_experts"),
        limit=LazyFunction(PALLAS_TPU, "limit"),
        most_tokens=LazyFunction(PALLAS_TPU, "most_tokens"),
        describe=lambda: "the fused Pallas kernel for tpu",
        has_interpreter=True,
    ),
    "pallas_gpu": Implementation(
        LazyFunction(PALLAS_GPU, "bin_experts"),
        limit=LazyFunction(PALLAS_GPU, "limit"),
        most_tokens=LazyFunction(PALLAS_GPU, "most_tokens"),
        describe=lambda: "the fused Pallas kernel for gpu",
        has_interpreter=True,
    ),
}
