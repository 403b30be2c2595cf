"""Which kernels a model runs, decided once for a platform and a dtype, and why."""

from dataclasses import dataclass
from typing import Any

from jmoe_kernels import grouped_mlp, paged_attention
from jmoe_kernels.matmul import Dense
from jmoe_kernels.paged_attention import Heads


@dataclass(frozen=True)
class Kernels:
    """platform: of the devices. experts: the grouped MLP. dense: dense products. attention: over the cache.

    why, why_attention: one line each for a person.
    """

    platform: str
    experts: grouped_mlp.Implementation
    dense: Dense
    attention: paged_attention.Attention
    why: str
    why_attention: str


def choose(
    platform: str,
    dtype: Any,
    experts: grouped_mlp.Implementation | None = None,
    dims: tuple[int, int, int] | None = None,
    heads: Heads | None = None,
) -> Kernels:
    """The kernels for weights of ``dtype`` on ``platform`` ("cpu", "tpu", "gpu").

    experts: a named implementation; raises ValueError where it cannot run. None picks. dims: (experts, inner,
    model) of one rank's weights; heads: of its attention. Both are needed where a kernel has limits on them.
    """
    if experts is None:
        experts, why = grouped_mlp.pick(platform, dtype, dims)
    elif reason := grouped_mlp.supports(experts, platform, dtype):
        raise ValueError(f"moe.kernel: {reason}")
    else:
        why = "named in the moe config"
    dense: Dense = "cpu" if experts == "cpu" else "xla"
    if platform == "cpu":  # one library has them all: a portable model is portable throughout
        return Kernels(platform, experts, dense, dense, why, "goes with the experts' kernel")
    attention, why_attention = (
        paged_attention.pick(platform, dtype, heads) if heads else ("xla", "portable XLA")
    )
    return Kernels(platform, experts, dense, attention, why, why_attention)
