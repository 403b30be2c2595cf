"""How the ranks of a mesh share an expert cache: each has a cache of its own experts only.

Inside ``shard_map`` a rank's shard of every array looks like the whole array of a single device, with the
rank's L experts in place of the model's E; outside, the shards are concatenated along the first axis. The
predictor is the same on all ranks: each rank shows it the tokens of all ranks, in the order of their
sequences, and takes the forecast of its own experts. The functions before ``Ranks`` say which experts the
rows of one layer go to, as every executor of the cache needs it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int

from jmoe.mesh import DATA, EXPERT, TOKENS
from jmoe.moe.routing import plan_dispatch
from jmoe.moe.types import DispatchPlan, Routing
from jmoe.offload.policy import Usage
from jmoe.offload.table import Moves, Table
from jmoe.offload.types import Forecast

EACH, SAME = PartitionSpec(TOKENS), PartitionSpec()
TABLE = Table(EACH, Usage(EACH, EACH, SAME, EACH), EACH)  # pyright: ignore[reportArgumentType]  # one clock
MOVES = Moves(EACH, EACH, SAME, EACH)


def assigned(routing: Routing, valid_T: Bool[Array, " T"]) -> Int[Array, "T K"]:
    """The experts of valid tokens; E, which means none, for the others."""
    return jnp.where(valid_T[:, None], routing.ids_TK, routing.scores_TE.shape[1])


def needed(ids_TK: Int[Array, "T K"], experts: int) -> Bool[Array, " E"]:
    return jnp.zeros(experts, bool).at[ids_TK.reshape(-1)].set(True, mode="drop")


def highest(scores_TE: Float[Array, "T E"], valid_T: Bool[Array, " T"]) -> Float[Array, " E"]:
    """The highest score of each expert over the valid tokens with a finite score; 0 if there are none."""
    return jnp.max(jnp.where(valid_T[:, None] & jnp.isfinite(scores_TE), scores_TE, 0.0), axis=0)


def by_slot(ids_TK: Int[Array, "T K"], slot_E: Int[Array, " E"], nowhere: int) -> DispatchPlan:
    """The assignments in the order of their experts' slots, 0 to ``nowhere - 1``; ``nowhere`` means none."""
    slot_TK = jnp.append(slot_E, jnp.int32(nowhere))[ids_TK]
    return plan_dispatch(slot_TK, jnp.ones(len(ids_TK), bool), 0, nowhere)


@dataclass(frozen=True)
class Ranks:
    """The ranks that share a cache. mesh: None for a single device, which has all tokens and all experts."""

    mesh: Mesh | None = None

    def over(self, run: Callable, ins: Any, outs: Any) -> Callable:
        """``run`` on every rank, with arguments and results sharded as ``ins`` and ``outs`` say."""
        if self.mesh is None:
            return run
        return jax.shard_map(run, mesh=self.mesh, in_specs=ins, out_specs=outs, check_vma=False)

    def kept(self, tree: Any, specs: Any) -> Any:
        """``tree`` sharded as ``specs``, a prefix of it, say; under jit."""
        if self.mesh is None:
            return tree
        mesh = self.mesh
        return lax.with_sharding_constraint(tree, jax.tree.map(partial(NamedSharding, mesh), specs))

    # Inside shard_map:

    def own(self, values_ZE: Array, held: int) -> Array:
        """The values of this rank's ``held`` experts."""
        if self.mesh is None:
            return values_ZE
        return lax.dynamic_slice_in_dim(values_ZE, lax.axis_index(EXPERT) * held, held, values_ZE.ndim - 1)

    def own_forecast(self, forecast: Forecast, held: int) -> Forecast:
        return Forecast(*(self.own(each_AE, held) for each_AE in forecast))

    def of_group(self, values_E: Float[Array, " E"], held: int) -> Float[Array, " L"]:
        """The highest value of each of this rank's experts, over the ranks whose tokens they serve."""
        return values_E if self.mesh is None else self.own(lax.pmax(values_E, EXPERT), held)

    def all_experts(self, own_L: Bool[Array, " L"]) -> Bool[Array, " E"]:
        return own_L if self.mesh is None else lax.all_gather(own_L, EXPERT, tiled=True)

    def all_rows(self, rows: Any, row_N: Int[Array, " N"] | None) -> Any:
        """Gathers the rows of all ranks, in the order of their sequences. row_N: the row of each token of the
        data group, if tokens were shuffled."""
        if self.mesh is None:
            return rows

        def whole(rows_T: Array) -> Array:
            rows_N = lax.all_gather(rows_T, EXPERT, tiled=True)
            return lax.all_gather(rows_N if row_N is None else rows_N[row_N], DATA, tiled=True)

        return jax.tree.map(whole, rows)

    def total(self, counts: Any) -> Any:
        return counts if self.mesh is None else lax.psum(counts, TOKENS)

    def tokens(self, own: int) -> int:
        """The number of tokens of a data group if each rank has ``own``."""
        return own if self.mesh is None else own * self.mesh.shape[EXPERT]


def most_needed(ids_TK: Int[Array, "T K"], ranks: Ranks, held: int) -> int:
    """The maximum number of a rank's ``held`` experts that its group's tokens can need."""
    t, k = ids_TK.shape
    return min(held, ranks.tokens(t) * k)


def needed_here(ids_TK: Int[Array, "T K"], ranks: Ranks, experts: int, held: int) -> Bool[Array, " L"]:
    """Whether any token of the group goes to each of this rank's experts."""
    used_E = jnp.zeros(experts, jnp.float32).at[ids_TK.reshape(-1)].set(1.0, mode="drop")
    return ranks.of_group(used_E, held) > 0
