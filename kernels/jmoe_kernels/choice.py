"""The choice of a model's kernels, made once for a platform and a dtype, and the reasons for it."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from jax import Array

from jmoe_kernels import binning, grouped_mlp, paged_attention
from jmoe_kernels.backends import (
    AttentionKernel,
    BinningKernel,
    DenseKernel,
    ExpertKernel,
    RotationKernel,
    get_backend,
)
from jmoe_kernels.matmul import linear
from jmoe_kernels.paged_attention import Heads
from jmoe_kernels.quantised import Weight
from jmoe_kernels.settings import Activations


@dataclass(frozen=True)
class Kernels:
    """The kernels that a model runs.

    platform: platform of the devices.
    experts: implementation of the grouped MLP.
    dense: implementation of dense products.
    attention: implementation of attention over the cache.
    why_experts: reason for the experts' kernel, one line for a person.
    why_attention: reason for the kernel of attention, likewise.
    binning: implementation of binning of decode batches; "xla" if binning is not configured.
    why_binning: reason for the kernel of binning, likewise.
    rotation: kernel that norms and rotates queries and keys; "xla" is none.
    activations: what kernels that multiply with the codes of quantised weights round the other factor to.
    """

    platform: str
    experts: ExpertKernel
    dense: DenseKernel
    attention: AttentionKernel
    why_experts: str
    why_attention: str
    binning: BinningKernel
    why_binning: str
    rotation: RotationKernel
    activations: Activations = "auto"

    def multiply(self, x: Array, w: Weight) -> Array:
        """Returns the dense product ``x @ w.T`` in float32 (see ``linear``)."""
        return linear(x, w, self.dense, self.activations)


def choose_kernels(
    platform: str,
    dtype: Any,
    experts: ExpertKernel | None = None,
    dims: tuple[int, int, int] | None = None,
    heads: tuple[Heads, ...] = (),
    needs: binning.BinningNeeds | None = None,
    codings: Collection[grouped_mlp.ExpertCodings] = (),
) -> Kernels:
    """Returns the kernels for weights of ``dtype`` on ``platform`` ("cpu", "tpu", "gpu").

    experts: name of the experts' implementation; None picks one.
    dims: (experts, inner, model) of one rank's weights; needed if a kernel has limits on them.
    heads: heads of one rank's attention in every layer; needed if a kernel has limits on them.
    needs: what the model needs of binning; None means no binning.
    codings: how the experts of the layers are stored, each way once; empty if nothing is quantised.
    Raises ValueError if the implementation named by ``experts`` cannot run.
    """
    backend = get_backend(platform)
    first = backend.experts[0]
    if experts is None:
        experts, why = grouped_mlp.pick(platform, dtype, dims, codings or (grouped_mlp.PLAIN,))
        is_own = grouped_mlp.why_not(first, platform, dtype) is None
    else:
        reason = grouped_mlp.why_not(experts, platform, dtype)
        if reason is None and dims and codings:
            reason = grouped_mlp.why_not_weights(experts, dims, dtype, codings)
        if reason is not None:
            raise ValueError(f"moe.kernel: {reason}")
        why, is_own = "named in the moe config", experts == first
    dense: DenseKernel = backend.dense if is_own else "xla"
    if backend.has_one_library:  # with portable experts, attention is portable too
        attention, why_attention = backend.attention[0 if is_own else -1], "goes with the experts' kernel"
    else:
        attention, why_attention = (
            paged_attention.pick(platform, dtype, heads) if heads else ("xla", "portable XLA")
        )
    bin_with, why_bin = ("xla", "not configured") if needs is None else binning.pick(platform, needs)
    rotation: RotationKernel = backend.rotation if is_own else "xla"
    return Kernels(platform, experts, dense, attention, why, why_attention, bin_with, why_bin, rotation)
