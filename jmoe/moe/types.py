"""Types at the seams of one MoE layer, and the glossary of axis letters.

=====  ==========================================================
T      tokens of the batch, local to a shard inside ``shard_map``
B, S   sequences of a batch; positions of a sequence
K      experts per token
E      experts of the layer
L      experts held by one shard (E / expert-parallel size)
R      ranks along the ``expert`` axis
C      rows of a physical buffer
N      rows sorted by expert (N = T * K on one device)
D      model dimension
F      inner dimension of an expert
=====  ==========================================================

A name's suffix spells its axes: ``ids_TK`` is ``[tokens, experts per token]``.
"""

from dataclasses import dataclass

import jax
from jax import Array
from jaxtyping import Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """Which experts each token goes to, and with what weight.

    ids_TK: expert ids, distinct within a token. weights_TK: float32 combine weights.
    scores_TE: the router's scores (softmax probabilities) of every expert, float32.
    """

    ids_TK: Int[Array, "T K"]
    weights_TK: Float[Array, "T K"]
    scores_TE: Float[Array, "T E"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DispatchPlan:
    """Assignments (token, choice) in expert order.

    order_N: flat assignment index ``t * K + k`` at each sorted row; assignments of padding tokens and
    of experts outside the plan come last. group_sizes_L: rows of each expert of the plan.
    """

    order_N: Int[Array, " N"]
    group_sizes_L: Int[Array, " L"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DispatchStats:
    """What one layer did with one batch, summed over shards.

    counts_E: assignments of valid tokens to each expert. mean_score_E: the router's mean score of each
    expert over valid tokens. remote: assignments whose expert lives on another rank than the token.
    dropped: assignments that no expert computed (only the training form has a capacity to exceed).
    """

    counts_E: Int[Array, " E"]
    mean_score_E: Float[Array, " E"]
    remote: Int[Array, ""]
    dropped: Int[Array, ""]
