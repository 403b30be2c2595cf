"""Types at the seams of one MoE layer, and the glossary of axis letters.

=====  ==========================================================
T      tokens of the batch, local to a shard inside ``shard_map``
B, S   sequences of a batch; positions of a sequence
K      experts per token
J      columns of a token's assignments where some may be absent (K, or more)
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

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int
from jmoe_kernels.grouped_mlp import ExpertWeights

from jmoe.config.techniques import LossyConfig, Phase


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """The experts of each token, and their weights.

    ids_TK: expert ids, distinct within a token. The id E (one past the last expert) marks an absent
        assignment: its weight is 0, it is not sent anywhere and adds nothing.
    weights_TK: combine weights, float32.
    scores_TE: router's scores of all experts, float32; they sum to 1 over a token's experts.
    logits_TE: token's preference for each expert, float32: the log of the value that the choice is made
        by, up to a constant. -inf marks an expert that may not be chosen.
    plan: assignments to all E experts in expert order, if a stage has already computed it.
    """

    ids_TK: Int[Array, "T K"]
    weights_TK: Float[Array, "T K"]
    scores_TE: Float[Array, "T E"]
    logits_TE: Float[Array, "T E"]
    plan: "DispatchPlan | None" = None

    def with_assignments(self, ids_TJ: Int[Array, "T J"], weights_TJ: Float[Array, "T J"]) -> "Routing":
        """Returns a copy with new assignments and weights; scores and logits are kept, ``plan`` is dropped
        because it no longer matches."""
        return Routing(ids_TJ, weights_TJ, self.scores_TE, self.logits_TE)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenFlags:
    """Flags of each token of the shard.

    valid_T: whether the token is real and not padding.
    exact_T: whether the token's request opted out of all lossy techniques; None if no request did.
    priority_T: priority of each token; under a limit, tokens of higher priority keep their experts
        first. None if all are equal.
    decoded_T: decode tokens of a step that has prompt tokens too; None if the step holds only one kind.
    """

    valid_T: Bool[Array, " T"]
    exact_T: Bool[Array, " T"] | None = None
    priority_T: Float[Array, " T"] | None = None
    decoded_T: Bool[Array, " T"] | None = None

    @property
    def lossy_T(self) -> Bool[Array, " T"]:
        """Whether a lossy technique may touch each token."""
        return self.valid_T if self.exact_T is None else self.valid_T & ~self.exact_T

    def without_decode(self) -> "TokenFlags":
        """Returns a copy in which a technique for prompts may not touch decode tokens of the same step."""
        if self.decoded_T is None:
            return self
        spared_T = self.decoded_T if self.exact_T is None else self.decoded_T | self.exact_T
        return replace(self, exact_T=spared_T)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Knobs:
    """The settings that lossy techniques read in each step, so that they can change without recompilation.

    values: float32 settings, by the names of ``MoEConfig.knobs``.
    seed: seed of random choices; it differs in each step.
    """

    values: Mapping[str, Float[Array | np.ndarray, ""]]
    seed: Int[Array | np.ndarray, ""]

    def value(self, table: LossyConfig, field: str) -> Float[Array | np.ndarray, ""]:
        """Returns the present value of one of the table's knobs."""
        return self.values[f"{table.name}.{field}"]

    def for_part(self, part: Array | int) -> "Knobs":
        """Returns a copy with a separate seed for one of several layers or shards."""
        return Knobs(self.values, self.seed * 1_000_003 + part)


# The sums that one layer counts, by the names of ``jmoe.config.counters``.
Counts = dict[str, Int[Array, ""]]
# Changed assignments of each token, by all names of ``LOSSY`` there; of each sequence once they are summed.
Changes = dict[str, Int[Array, " T"]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DispatchPlan:
    """Assignments (token, choice) in expert order.

    order_N: flat assignment index ``t * K + k`` at each sorted row; assignments of padding tokens and of
        experts outside the plan come last.
    group_sizes_L: number of rows of each expert of the plan.
    """

    order_N: Int[Array, " N"]
    group_sizes_L: Int[Array, " L"]

    @property
    def num_rows(self) -> Int[Array, ""]:
        """The number of assignments to experts of the plan."""
        return jnp.sum(self.group_sizes_L, dtype=jnp.int32)

    @property
    def inverse_N(self) -> Int[Array, " N"]:
        """The sorted row of each flat assignment."""
        n = self.order_N.shape[0]
        rows_N = jnp.arange(n, dtype=jnp.int32)
        return jnp.zeros(n, jnp.int32).at[self.order_N].set(rows_N, unique_indices=True)


class ExpertOutput(NamedTuple):
    """The experts' output, float32, and the number of assignments that they computed (rows in their
    groups)."""

    y_ND: Float[Array, "N D"]
    num_rows: Int[Array, ""]


@dataclass(frozen=True)
class LocalExperts:
    """The L experts of one rank as functions.

    num_experts: L, the number of experts.
    dtype: weights' dtype; both functions round their input to it.
    run_tokens: (x_TD, weights_TJ, plan) -> y_TD, each token's weighted sum of its planned experts.
    run_rows: (rows_ND, group_sizes_L) -> y_ND for rows that are already sorted by expert; rows after the last
        group come out zero.
    weigh_input: whether the weight multiplies the expert's input row, not its output row.
    """

    num_experts: int
    dtype: jnp.dtype
    run_tokens: Callable[[Array, Array, DispatchPlan], ExpertOutput]
    run_rows: Callable[[Array, Array], ExpertOutput]
    weigh_input: bool = False


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Traffic:
    """Rows of D numbers moved between ranks, and the assignments that arrived.

    Rows are counted one way: in every transport as many come back as went out.

    useful_rows: distinct pairs of a valid token and another rank that holds one of its experts. This is the
        minimum that any transport must move, so the three transports can be compared by it.
    sent_rows: rows sent over the network, padding included; rows that stay on their rank are not counted.
    num_received: assignments that the rank's experts received, from any rank.

    With a tensor axis, every tensor rank moves its own copy of these rows; ``useful_rows`` and ``sent_rows``
    count one copy. The few bytes of ids and sizes that travel with the rows are not counted either.
    """

    useful_rows: Int[Array, ""]
    sent_rows: Int[Array, ""]
    num_received: Int[Array, ""]


# (x_TD, routing, valid_T, one rank's experts) -> (y_TD, the rank's traffic), see ``jmoe.moe.transport``
Send = Callable[[Array, Routing, Array, LocalExperts], tuple[Array, Traffic]]


class Apply(Protocol):
    """A function that computes some of the experts.

    weigh_input: see ``LocalExperts``.
    """

    @property
    def weigh_input(self) -> bool: ...

    def __call__(
        self, x_TD: Array, weights_TK: Array, plan: DispatchPlan, experts: ExpertWeights
    ) -> Float[Array, "T D"]:
        """Returns each token's weighted sum of its planned experts, float32."""
        ...

    def local_experts(self, experts: ExpertWeights) -> LocalExperts:
        """Returns the experts of one rank as a transport takes them."""
        ...


class ExpertSource(Protocol):
    """The source of a layer's experts. It is a pytree; inside ``shard_map`` it is one rank's part, with the
    experts of that rank."""

    @property
    def specs(self) -> Any:
        """The split of the source over a mesh."""
        ...

    @property
    def next_specs(self) -> Any:
        """The split of the source for the next layer; None if there is none."""
        ...

    @property
    def resident_E(self) -> Bool[Array, " E"] | None:
        """Whether each expert is on the devices that share the tokens of this device; None if all are."""
        ...

    def run(
        self,
        x_TD: Float[Array, "T D"],
        plain_routing: Routing,
        routing: Routing,
        valid_T: Bool[Array, " T"],
        phase: Phase,
        apply: Apply,
        send: Send,
    ) -> tuple[Float[Array, "T D"], Traffic, Counts, Self | None]:
        """Runs the experts of ``routing`` on this layer's tokens; returns their output, the traffic, the
        counts over all ranks and the source for the next layer, None if that layer has its own.

        plain_routing: own choice of the router, from which the source may learn.
        send: function that moves tokens to the ranks that hold their experts.
        """
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DispatchStats:
    """The statistics of one layer for one batch, summed over shards.

    counts_E: assignments of valid tokens that each expert received.
    plain_counts_E: assignments that the router gave each expert, before any lossy technique.
    mean_score_E: router's mean score of each expert over valid tokens.
    traffic: rows that were moved.
    counts: all other counters; those of an expert cache are absent if all experts are on the device.
    """

    counts_E: Int[Array, " E"]
    plain_counts_E: Int[Array, " E"]
    mean_score_E: Float[Array, " E"]
    traffic: Traffic
    counts: Counts

    @property
    def num_lost(self) -> Int[Array, ""]:
        """The number of assignments that no expert received, or that were computed in excess. Any value but 0
        means a wrong output."""
        return jnp.abs(jnp.sum(self.counts_E, dtype=jnp.int32) - self.traffic.num_received)

    @property
    def sums(self) -> Counts:
        """``counts``, and the counters that follow from the other fields."""
        moved = {
            "transport_bytes": self.traffic.sent_rows,
            "transport_useful_bytes": self.traffic.useful_rows,
        }
        return self.counts | moved | {"lost_assignments": self.num_lost}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MoEOutput:
    """The results of one layer.

    y_TD: experts' combined output, float32; zero for invalid tokens.
    routing: own choice of the router.
    stats: what the layer did with the batch.
    changes: what lossy techniques changed for each token; None if nothing lossy is on.
    source: source of the next layer's experts, if experts are offloaded.
    """

    y_TD: Float[Array, "T D"]
    routing: Routing
    stats: DispatchStats
    changes: Changes | None
    source: ExpertSource | None = None
