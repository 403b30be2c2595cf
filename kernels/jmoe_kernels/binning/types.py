"""The rule that binning follows, what its choice depends on, and the result that it returns."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
from jax import Array
from jaxtyping import Bool, Float, Int

from jmoe_kernels.backends import BinningKernel
from jmoe_kernels.settings import BinningMethod

BINS = 6  # the last bin takes all larger gaps
EXACT = BINS  # the row of a table of votes with the choices of exact tokens, after those of the bins
VOTE_ROWS = BINS + 1


@dataclass(frozen=True)
class Rule:
    """The rule that chooses the active set. A rule is static, so a different one compiles again.

    method: name of the method; ``reference.choose_active`` shows what each of them keeps.
    k: number of experts that a token chooses.
    bin_width: width of a bin in nats ("affinity", "budget").
    k0: number of choices that every token keeps ("oea").
    keep: share of the batch's union of experts that stays ("budget", "popularity", "random").
    """

    method: BinningMethod
    k: int
    bin_width: float
    k0: int
    keep: float


@dataclass(frozen=True)
class BinningNeeds:
    """The needs of a model, by which an implementation of binning is chosen.

    num_experts: number of experts of all ranks.
    rule: how the active set is chosen.
    has_bonus: whether a bonus on the logits makes tokens prefer some experts.
    has_plain_router: whether the router is a softmax and a top-k of the logits.
    """

    num_experts: int
    rule: Rule
    has_bonus: bool = False
    has_plain_router: bool = True


class KernelChoice(NamedTuple):
    """The chosen implementation of binning, and its platform.

    implementation: name of the implementation.
    platform: platform of the devices.
    interpret: whether a Pallas kernel runs in its interpreter, on any platform.
    """

    implementation: BinningKernel
    platform: str
    interpret: bool = False


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Binned:
    """A softmax router's choice, the choice remapped to the active set, and its order by expert.

    plain_ids_TK: experts that the router chose, best first.
    plain_weights_TK: weights that the router gave them.
    ids_TK: experts after remapping; a moved choice is replaced in its place.
    weights_TK: weights after remapping.
    scores_TE: softmax of the logits.
    active_E: mask of the experts that tokens may go to.
    order_N: assignments ``t * K + k`` by expert, stable; those of padding tokens come last.
    group_sizes_E: number of rows of each expert.
    """

    plain_ids_TK: Int[Array, "T K"]
    plain_weights_TK: Float[Array, "T K"]
    ids_TK: Int[Array, "T K"]
    weights_TK: Float[Array, "T K"]
    scores_TE: Float[Array, "T E"]
    active_E: Bool[Array, " E"]
    order_N: Int[Array, " N"]
    group_sizes_E: Int[Array, " E"]
