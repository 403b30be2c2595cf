"""Which kernels a model runs, decided once for a platform and a dtype, and why."""

from dataclasses import dataclass
from typing import Any

from jmoe_kernels import binning, grouped_mlp, paged_attention
from jmoe_kernels.matmul import Dense
from jmoe_kernels.paged_attention import Heads


@dataclass(frozen=True)
class Kernels:
    """platform: of the devices. experts: the grouped MLP. dense: dense products. attention: over the cache.
    binning: of decode batches, where it is configured.

    why, why_attention, why_binning: one line each for a person.
    """

    platform: str
    experts: grouped_mlp.Implementation
    dense: Dense
    attention: paged_attention.Attention
    why: str
    why_attention: str
    binning: binning.Implementation
    why_binning: str


def choose(
    platform: str,
    dtype: Any,
    experts: grouped_mlp.Implementation | None = None,
    dims: tuple[int, int, int] | None = None,
    heads: Heads | None = None,
    binned: tuple[int, binning.Rule] | None = None,
) -> Kernels:
    """The kernels for weights of ``dtype`` on ``platform`` ("cpu", "tpu", "gpu").

    experts: a named implementation; raises ValueError where it cannot run. None picks. dims: (experts, inner,
    model) of one rank's weights; heads: of its attention. Both are needed where a kernel has limits on them.
    binned: the experts of all ranks and the rule by which a batch is binned onto fewer; None is not at all.
    """
    if experts is None:
        experts, why = grouped_mlp.pick(platform, dtype, dims)
    elif reason := grouped_mlp.supports(experts, platform, dtype):
        raise ValueError(f"moe.kernel: {reason}")
    else:
        why = "named in the moe config"
    dense: Dense = "cpu" if experts == "cpu" else "xla"
    if platform == "cpu":  # one library has them all: a portable model is portable throughout
        attention, why_attention = dense, "goes with the experts' kernel"
    else:
        attention, why_attention = (
            paged_attention.pick(platform, dtype, heads) if heads else ("xla", "portable XLA")
        )
    bin_with, why_bin = ("xla", "not configured") if binned is None else binning.pick(platform, *binned)
    return Kernels(platform, experts, dense, attention, why, why_attention, bin_with, why_bin)
