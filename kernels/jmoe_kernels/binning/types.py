"""What binning takes and gives. Axes: T tokens, K experts a token, E experts, N = T * K, V rows of votes."""

from dataclasses import dataclass
from typing import Literal

import jax
from jax import Array
from jaxtyping import Bool, Float, Int

Method = Literal["affinity", "oea", "budget", "popularity", "random"]
BINS = 6  # the last one takes all affinities beyond
EXACT = BINS  # the row of a table of votes with the choices of exact tokens, after those of the bins
VOTE_ROWS = BINS + 1


@dataclass(frozen=True)
class Rule:
    """How the active set is chosen: static, so that another one compiles again.

    method: see ``reference``. k: experts a token. bin_width: nats ("affinity", "budget"). k0: choices that
    every token keeps ("oea"). keep: share of the batch's union that stays ("budget", "popularity", "random").
    """

    method: Method
    k: int
    bin_width: float = 0.5
    k0: int = 3
    keep: float = 0.5


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Binned:
    """A softmax router's choice, the choice remapped to the active set, and its order by expert.

    plain_ids_TK, plain_weights_TK: the router's own, best first. ids_TK, weights_TK: remapped in place.
    scores_TE: softmax of the logits. active_E: experts that tokens may go to. order_N: assignments
    ``t * K + k`` by expert, stable, those of padding tokens last; group_sizes_E: rows of each expert.
    """

    plain_ids_TK: Int[Array, "T K"]
    plain_weights_TK: Float[Array, "T K"]
    ids_TK: Int[Array, "T K"]
    weights_TK: Float[Array, "T K"]
    scores_TE: Float[Array, "T E"]
    active_E: Bool[Array, " E"]
    order_N: Int[Array, " N"]
    group_sizes_E: Int[Array, " E"]
