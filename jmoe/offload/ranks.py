"""An expert cache on the ranks of a mesh: each rank has a cache of its own experts only.

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
from jmoe.offload.policy import UseHistory
from jmoe.offload.slot_table import Copies, SlotTable
from jmoe.offload.types import Forecast

EACH, SAME = PartitionSpec(TOKENS), PartitionSpec()
TABLE = SlotTable(EACH, UseHistory(EACH, EACH, SAME, EACH), EACH)  # pyright: ignore[reportArgumentType]  # one clock
COPIES = Copies(EACH, EACH, SAME, EACH)


def assigned(routing: Routing, valid_T: Bool[Array, " T"]) -> Int[Array, "T K"]:
    """Returns the experts of valid tokens; the others have E, which means none."""
    return jnp.where(valid_T[:, None], routing.ids_TK, routing.scores_TE.shape[1])


def needed(ids_TK: Int[Array, "T K"], experts: int) -> Bool[Array, " E"]:
    return jnp.zeros(experts, bool).at[ids_TK.reshape(-1)].set(True, mode="drop")


def highest(scores_TE: Float[Array, "T E"], valid_T: Bool[Array, " T"]) -> Float[Array, " E"]:
    """Returns the highest score of each expert over the valid tokens with a finite score, or 0 if there are
    none."""
    return jnp.max(jnp.where(valid_T[:, None] & jnp.isfinite(scores_TE), scores_TE, 0.0), axis=0)


def by_slot(ids_TK: Int[Array, "T K"], slot_E: Int[Array, " E"], no_slot: int) -> DispatchPlan:
    """Sorts the assignments by their experts' slots, 0 to ``no_slot - 1``; ``no_slot`` means none."""
    slot_TK = jnp.append(slot_E, jnp.int32(no_slot))[ids_TK]
    return plan_dispatch(slot_TK, jnp.ones(len(ids_TK), bool), 0, no_slot)


@dataclass(frozen=True)
class Ranks:
    """The ranks that share a cache.

    mesh: None for a single device, which has all tokens and all experts.
    """

    mesh: Mesh | None = None

    def over(self, run: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """Makes ``run`` a function that runs on every rank, with arguments and results sharded by
        ``in_specs`` and ``out_specs``."""
        if self.mesh is None:
            return run
        return jax.shard_map(run, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def constrain(self, tree: Any, specs: Any) -> Any:
        """Constrains ``tree`` to the shardings ``specs``, which may be a prefix of it; it is for use under
        jit."""
        if self.mesh is None:
            return tree
        mesh = self.mesh
        return lax.with_sharding_constraint(tree, jax.tree.map(partial(NamedSharding, mesh), specs))

    # Inside shard_map:

    def local_part(self, values_ZE: Array, num_local: int) -> Array:
        """Returns the values of this rank's ``num_local`` experts."""
        if self.mesh is None:
            return values_ZE
        return lax.dynamic_slice_in_dim(
            values_ZE, lax.axis_index(EXPERT) * num_local, num_local, values_ZE.ndim - 1
        )

    def local_forecast(self, forecast: Forecast, num_local: int) -> Forecast:
        return Forecast(*(self.local_part(each_AE, num_local) for each_AE in forecast))

    def group_max(self, values_E: Float[Array, " E"], num_local: int) -> Float[Array, " L"]:
        """Returns the highest value of each of this rank's experts, over the ranks whose tokens they
        serve."""
        return values_E if self.mesh is None else self.local_part(lax.pmax(values_E, EXPERT), num_local)

    def all_experts(self, local_L: Bool[Array, " L"]) -> Bool[Array, " E"]:
        return local_L if self.mesh is None else lax.all_gather(local_L, EXPERT, tiled=True)

    def all_rows(self, rows: Any, row_N: Int[Array, " N"] | None) -> Any:
        """Gathers the rows of all ranks, in the order of their sequences.

        row_N: row of each token of the data group, if tokens were shuffled.
        """
        if self.mesh is None:
            return rows

        def whole(rows_T: Array) -> Array:
            rows_N = lax.all_gather(rows_T, EXPERT, tiled=True)
            return lax.all_gather(rows_N if row_N is None else rows_N[row_N], DATA, tiled=True)

        return jax.tree.map(whole, rows)

    def total(self, counts: Any) -> Any:
        return counts if self.mesh is None else lax.psum(counts, TOKENS)

    def group_tokens(self, tokens_per_rank: int) -> int:
        """Returns the number of tokens of a data group if each rank has ``tokens_per_rank``."""
        return tokens_per_rank if self.mesh is None else tokens_per_rank * self.mesh.shape[EXPERT]


def max_needed(ids_TK: Int[Array, "T K"], ranks: Ranks, num_local: int) -> int:
    """Returns the maximum number of a rank's ``num_local`` experts that its group's tokens can need."""
    t, k = ids_TK.shape
    return min(num_local, ranks.group_tokens(t) * k)


def needed_on_rank(
    ids_TK: Int[Array, "T K"], ranks: Ranks, experts: int, num_local: int
) -> Bool[Array, " L"]:
    """Returns whether any token of the group goes to each of this rank's experts."""
    used_E = jnp.zeros(experts, jnp.float32).at[ids_TK.reshape(-1)].set(1.0, mode="drop")
    return ranks.group_max(used_E, num_local) > 0
