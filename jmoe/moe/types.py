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

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int
from jmoe_kernels.choice import Kernels
from jmoe_kernels.grouped_mlp import ExpertWeights

from jmoe.config.model import ModelConfig

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class LayerSetup:
    """What a layer is made for: its model, its mesh and the kernels of one rank."""

    cfg: ModelConfig
    mesh: Mesh
    kernels: Kernels


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """Which experts each token goes to, and with what weight.

    ids_TK: expert ids, distinct within a token; E, one past the last, is an absent assignment, of weight 0:
    it goes nowhere and adds nothing. weights_TK: float32 combine weights.
    scores_TE: the router's scores of every expert, which sum to 1. logits_TE: how much the token prefers
    each, the log of what it is chosen by up to a constant; -inf is an expert that may not be. Both float32.
    plan: the assignments to all E experts in expert order, where a stage has made it on its way.
    """

    ids_TK: Int[Array, "T K"]
    weights_TK: Float[Array, "T K"]
    scores_TE: Float[Array, "T E"]
    logits_TE: Float[Array, "T E"]
    plan: "DispatchPlan | None" = None

    def with_assignments(self, ids_TJ: Int[Array, "T J"], weights_TJ: Float[Array, "T J"]) -> "Routing":
        """The same router's word with other assignments, not in order yet."""
        return Routing(ids_TJ, weights_TJ, self.scores_TE, self.logits_TE)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenFlags:
    """What each token of the shard is.

    valid_T: not padding. exact_T: its request opted out of everything lossy; None = none did. priority_T:
    under a limit, tokens of higher priority keep their experts first; None = all alike. decoded_T: decoded
    ones beside those of prompts; None where the step holds one kind.
    """

    valid_T: Bool[Array, " T"]
    exact_T: Bool[Array, " T"] | None = None
    priority_T: Float[Array, " T"] | None = None
    decoded_T: Bool[Array, " T"] | None = None

    @property
    def lossy_T(self) -> Bool[Array, " T"]:
        """Which tokens a lossy technique may touch."""
        return self.valid_T if self.exact_T is None else self.valid_T & ~self.exact_T

    def sparing_decoded(self) -> "TokenFlags":
        """The same, but a technique for prompts may not touch tokens that are decoded beside them."""
        if self.decoded_T is None:
            return self
        spared_T = self.decoded_T if self.exact_T is None else self.decoded_T | self.exact_T
        return replace(self, exact_T=spared_T)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Knobs:
    """Settings of the lossy techniques that change without compiling again.

    factor: gamma of the capacity. seed: of random choices; another one each step.
    """

    factor: Float[Array | np.ndarray, ""]
    seed: Int[Array | np.ndarray, ""]

    def of(self, part: Array | int) -> "Knobs":
        """The same with a seed of its own for one of several layers or shards."""
        return Knobs(self.factor, self.seed * 1_000_003 + part)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CapacityCounts:
    """Assignments of each token by what became of them; padding has none.

    The router's choices are kept + rerouted + dropped + exact (not subject to the limit); extra_T counts
    the experts that "expand" added.
    """

    kept_T: Int[Array, " T"]
    rerouted_T: Int[Array, " T"]
    dropped_T: Int[Array, " T"]
    extra_T: Int[Array, " T"]
    exact_T: Int[Array, " T"]


# By the names of ``jmoe.config.counters``: one layer's sums, of those that it counts.
Counts = dict[str, Int[Array, ""]]
# By the names of ``LOSSY`` there, all of them: each token's assignments; a sequence's where they are summed.
Changes = dict[str, Int[Array, " T"]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DispatchPlan:
    """Assignments (token, choice) in expert order.

    order_N: flat assignment index ``t * K + k`` at each sorted row; assignments of padding tokens and
    of experts outside the plan come last. group_sizes_L: rows of each expert of the plan.
    """

    order_N: Int[Array, " N"]
    group_sizes_L: Int[Array, " L"]

    @property
    def rows(self) -> Int[Array, ""]:
        """Assignments to experts of the plan."""
        return jnp.sum(self.group_sizes_L, dtype=jnp.int32)

    @property
    def inverse_N(self) -> Int[Array, " N"]:
        """The sorted row of each flat assignment."""
        n = self.order_N.shape[0]
        rows_N = jnp.arange(n, dtype=jnp.int32)
        return jnp.zeros(n, jnp.int32).at[self.order_N].set(rows_N, unique_indices=True)


class Computed(NamedTuple):
    """What experts gave, float32, and how many assignments they were given: rows in a group of theirs."""

    y_ND: Float[Array, "N D"]
    rows: Int[Array, ""]


@dataclass(frozen=True)
class LocalExperts:
    """The L experts of one rank as functions.

    combined: (x_TD, weights_TJ, plan) -> y_TD, each token's weighted sum of its planned experts.
    by_row: (rows_ND, group_sizes_L) -> y_ND, rows that are sorted by expert already; those past the last
    group come out zero. dtype: that of the weights, to which both round what comes in. weigh_input: a weight
    multiplies a row that goes in, not the one that comes out.
    """

    count: int
    dtype: jnp.dtype
    combined: Callable[[Array, Array, DispatchPlan], Computed]
    by_row: Callable[[Array, Array], Computed]
    weigh_input: bool = False


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Traffic:
    """Rows of D numbers between ranks, counted one way: as many come back as went out, in every transport.
    And those that arrived.

    useful: distinct pairs of a valid token and another rank that holds one of its experts. The least that
    any transport could move, so the three compare by it.
    sent: rows put on the wire, padding included; a rank's own rows are not on it.
    computed: assignments that the rank's experts were given, wherever they came from.
    A tensor axis multiplies both: every tensor rank moves a copy of its own, which neither counts. The few
    bytes of ids and sizes beside the rows are not counted either.
    """

    useful: Int[Array, ""]
    sent: Int[Array, ""]
    computed: Int[Array, ""]


# (x_TD, routing, valid_T, a rank's experts) -> (y_TD, the rank's traffic), see ``jmoe.moe.transport``
Send = Callable[[Array, Routing, Array, LocalExperts], tuple[Array, Traffic]]


class Apply(Protocol):
    """The computation over some experts. weigh_input: see ``LocalExperts``."""

    @property
    def weigh_input(self) -> bool: ...

    def __call__(
        self, x_TD: Array, weights_TK: Array, plan: DispatchPlan, experts: ExpertWeights
    ) -> Float[Array, "T D"]:
        """Each token's weighted sum of its planned experts, float32."""
        ...


class ExpertSource(Protocol):
    """Where the experts of a layer come from when they are not all on the device. A pytree; inside
    ``shard_map`` a rank's part of it, with the experts of that rank."""

    @property
    def specs(self) -> Any:
        """How it is split over a mesh."""
        ...

    @property
    def resident_E(self) -> Bool[Array, " E"]:
        """Which experts are on the devices that share this one's tokens."""
        ...

    def run(
        self,
        x_TD: Float[Array, "T D"],
        plain: Routing,
        routing: Routing,
        valid_T: Bool[Array, " T"],
        phase: Phase,
        apply: Apply,
        send: Send,
    ) -> tuple[Float[Array, "T D"], Traffic, Counts, Self]:
        """The experts of ``routing`` on this layer's tokens, what moved, what was done on all ranks, and the
        source of the next layer.

        plain: the router's own choice, from which it may learn. send: takes tokens to the ranks that hold
        their experts.
        """
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DispatchStats:
    """What one layer did with one batch, summed over shards.

    counts_E: assignments of valid tokens that each expert got; plain_E: those that the router gave it, before
    any lossy technique. mean_score_E: the router's mean score of each expert over valid tokens. traffic: rows
    that were moved. counts: everything else; those of a cache are absent where all experts are on the device.
    """

    counts_E: Int[Array, " E"]
    plain_E: Int[Array, " E"]
    mean_score_E: Float[Array, " E"]
    traffic: Traffic
    counts: Counts

    @property
    def lost(self) -> Int[Array, ""]:
        """Assignments that no expert was given, or one too many: anything but 0 is a wrong output."""
        return jnp.abs(jnp.sum(self.counts_E, dtype=jnp.int32) - self.traffic.computed)

    @property
    def sums(self) -> Counts:
        """``counts``, and what follows from the other fields."""
        moved = {"transport_bytes": self.traffic.sent, "transport_useful_bytes": self.traffic.useful}
        return self.counts | moved | {"lost_assignments": self.lost}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MoEOutput:
    """What one layer gives.

    y_TD: the experts' combined output, float32, zero for invalid tokens. routing: the router's own choice.
    changes: None where nothing lossy is on. source: of the next layer's experts, where they have one.
    """

    y_TD: Float[Array, "T D"]
    routing: Routing
    stats: DispatchStats
    changes: Changes | None
    source: ExpertSource | None = None
