"""``bin_experts``: one entry for every implementation; it raises if the named one cannot run."""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import get_args

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jmoe_kernels.backends import BinningKernel as Implementation
from jmoe_kernels.backends import first_supported, get_backend, home_of
from jmoe_kernels.binning.reference import bin_experts_reference
from jmoe_kernels.binning.types import Binned, KernelChoice, Rule


def _pallas(name: str) -> ModuleType:
    """Returns the module of a Pallas implementation, imported when it is needed."""
    return import_module(f"jmoe_kernels.binning.{name}")


def supports(
    implementation: str,
    platform: str,
    experts: int,
    rule: Rule,
    *,
    tokens: int = 1,
    interpret: bool = False,
) -> str | None:
    """Returns why ``implementation`` cannot bin on ``platform``, or None if it can.

    experts: number of experts that tokens choose from.
    tokens: number of tokens of a call.
    interpret: whether a Pallas kernel would run in its interpreter, on any platform.
    """
    if implementation not in get_args(Implementation):
        return f"binning {implementation!r} is unknown; known: {', '.join(get_args(Implementation))}"
    if (home := home_of(implementation)) is None:
        return None
    if home != platform and not interpret:
        return f"binning {implementation!r} needs a {home}, this is a {platform}; 'xla' can run"
    if rule.method == "random":
        return f"binning {implementation!r} has no random draws, which are a baseline; 'xla' can run"
    kernel = _pallas(implementation)
    reason = kernel.supports(experts, rule)
    if reason is None and tokens > (most := kernel.most_tokens(experts, rule.k)):
        reason = f"{tokens} tokens; it takes {most} with {experts} experts and k = {rule.k}"
    return reason and f"binning {implementation!r}: {reason}; 'xla' can run"


def pick(platform: str, experts: int, rule: Rule) -> tuple[Implementation, str]:
    """Returns the implementation for ``platform``, and the reason."""

    def praise(name: Implementation) -> str:
        most = _pallas(name).most_tokens(experts, rule.k)
        return f"the fused Pallas kernel for {platform}; portable XLA for more than {most} tokens a rank"

    return first_supported(
        get_backend(platform).binning, lambda name: supports(name, platform, experts, rule), praise
    )


def bin_experts(
    logits_TE: Float[Array, "T E"],
    valid_T: Bool[Array, " T"],
    lossy_T: Bool[Array, " T"],
    rule: Rule,
    choice: KernelChoice,
    *,
    renormalize: bool,
    total: Callable[[Array], Array] | None = None,
) -> Binned:
    """Routes by softmax, chooses the active set, remaps the assignments to it and orders them by expert.

    valid_T: mask of the tokens that are not padding.
    lossy_T: mask of those valid tokens that vote and may be remapped; experts of the others are always
        active.
    rule: how the set is chosen; its method may not be "random", for whose draws there is no argument.
    choice: what bins, and where.
    renormalize: whether a token's weights are scaled to sum to 1.
    total: function that sums the votes of the ranks that share the experts' weights, each of which bins its
        own tokens; None on a single rank.
    Raises ValueError with the reason if the named implementation cannot run.
    """
    (tokens, experts), (implementation, platform, interpret) = logits_TE.shape, choice
    reason = supports(implementation, platform, experts, rule, tokens=tokens, interpret=interpret)
    if reason is not None:
        raise ValueError(f"bin_experts: {reason}")
    logits_TE = logits_TE.astype(jnp.float32)
    if implementation == "xla":
        return bin_experts_reference(logits_TE, valid_T, lossy_T, rule, renormalize=renormalize, total=total)
    return _pallas(implementation).bin_experts(
        logits_TE, valid_T, lossy_T, rule, renormalize=renormalize, interpret=interpret, total=total
    )
