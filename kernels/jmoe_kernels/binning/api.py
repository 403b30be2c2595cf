"""``bin_experts``: one entry for every implementation; it raises if the named one cannot run."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jmoe_kernels.backends import BinningKernel, first_supported, get_backend, home_of
from jmoe_kernels.binning.implementations import IMPLEMENTATIONS
from jmoe_kernels.binning.types import Binned, BinningNeeds, KernelChoice, Rule


def why_not(
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
    interpret: whether it would run in its interpreter, on any platform.
    """
    if implementation not in IMPLEMENTATIONS:
        return f"binning {implementation!r} is unknown; known: {', '.join(IMPLEMENTATIONS)}"
    record = IMPLEMENTATIONS[implementation]
    home = home_of(implementation) or platform
    if home != platform and not interpret:
        return f"binning {implementation!r} needs a {home}, this is a {platform}; 'xla' can run"
    if interpret and not record.has_interpreter:
        return f"binning {implementation!r} has no interpreter"
    if rule.method == "random":
        return "method 'random' is a baseline; no implementation in one call has its random draws"
    reason = record.limit(experts, rule)
    if reason is None and record.most_tokens is not None:
        most = record.most_tokens(experts, rule.k)
        if tokens > most:
            reason = f"{tokens} tokens; it takes {most} with {experts} experts and k = {rule.k}"
    return reason and f"binning {implementation!r}: {reason}; 'xla' can run"


def pick(platform: str, needs: BinningNeeds) -> tuple[BinningKernel, str]:
    """Returns the implementation for ``platform``, and the reason."""
    if needs.has_bonus:
        return "xla", "portable XLA: no kernel knows a bonus"
    if not needs.has_plain_router:
        return "xla", "portable XLA: kernels know the softmax router alone"
    experts, rule = needs.num_experts, needs.rule

    def describe(name: BinningKernel) -> str:
        record = IMPLEMENTATIONS[name]
        if record.most_tokens is None:
            return record.describe()
        most = record.most_tokens(experts, rule.k)
        return f"{record.describe()}; portable XLA for more than {most} tokens per rank"

    names = get_backend(platform).binning
    return first_supported(names, lambda name: why_not(name, platform, experts, rule), describe)


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
    reason = why_not(implementation, platform, experts, rule, tokens=tokens, interpret=interpret)
    if reason is not None:
        raise ValueError(f"bin_experts: {reason}")
    record, logits_TE = IMPLEMENTATIONS[implementation], logits_TE.astype(jnp.float32)
    extra = {"interpret": interpret} if record.has_interpreter else {}
    return record.run(logits_TE, valid_T, lossy_T, rule, renormalize=renormalize, total=total, **extra)
