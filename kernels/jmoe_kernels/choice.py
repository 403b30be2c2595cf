"""Which kernels a model runs, decided once for a platform and a dtype, and why."""

from dataclasses import dataclass
from typing import Any

from jmoe_kernels.grouped_mlp import Implementation, pick, supports
from jmoe_kernels.matmul import Dense


@dataclass(frozen=True)
class Kernels:
    """experts: the grouped MLP. dense: dense products and paged attention. why: one line for a person."""

    experts: Implementation
    dense: Dense
    why: str


def choose(
    platform: str,
    dtype: Any,
    experts: Implementation | None = None,
    dims: tuple[int, int, int] | None = None,
) -> Kernels:
    """The kernels for weights of ``dtype`` on ``platform`` ("cpu", "tpu", "gpu").

    experts: a named implementation; raises ValueError where it cannot run. None picks. dims: (experts, inner,
    model) of one rank's weights.
    """
    if experts is None:
        experts, why = pick(platform, dtype, dims)
    elif reason := supports(experts, platform, dtype):
        raise ValueError(f"moe.kernel: {reason}")
    else:
        why = "named in the moe config"
    return Kernels(experts, "cpu" if experts == "cpu" else "xla", why)
