"""Speculative token shuffling: before the gate runs, tokens go to the rank that likely holds their experts.

Source: Li et al., "Speculative MoE" / "Semantic Parallelism" (arXiv 2503.04398), online scheduling with
tensor-parallel attention (algorithm 3). Heads are split over the experts' ranks, so the reduce-scatter after
attention distributes the tokens over the ranks anyway; any token may go to any rank, and ``jmoe.moe.orders``
chooses. Then the true gate runs, and assignments that are not local travel as usual: a wrong prediction costs
bytes but never changes the output.

    rows on their ranks, in the order of the layer before
      -> normed rows, all-gathered, that order undone (SAG) -> attention
      -> partial sums in this layer's order -> reduce-scatter (SRS)
       + the residual of the tokens whose rank has changed
      -> gate, exchange, experts; rows stay where they are until the next layer

Both collectives are those of plain attention "tp", in its dtypes. The only addition is the move of the
float32 residual, at most T rows per rank, which does not wait for attention; after the last layer it returns
all rows to their original order. Every rank knows both orders completely and computes all sizes and offsets
from them.

The move is a ragged exchange with every transport of the experts: the TPU compiler refuses it on the same
machines as the ragged transport (see ``jmoe.moe.transport``), v5e slices of 4x8 and larger. Config keys:
``[moe.shuffle]`` (``jmoe.config.techniques.ShuffleConfig``). Counters: ``remote_assignments`` and ``traffic``
of ``DispatchStats``, which count from the rank where the token then is, and only the experts' exchange.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Bool, Float, Int

from jmoe.mesh import DATA, EXPERT, TOKENS, platform_of
from jmoe.moe.orders import Hints, Move, Order, ShuffleTables, align, expected_shares, majority_rank
from jmoe.moe.transport import Exchange, get_exchange, starts
from jmoe.moe.types import MoEOutput

GROUP, ROWS = PartitionSpec(DATA), PartitionSpec(TOKENS)


@dataclass(frozen=True)
class Shuffle:
    """Distributes a data group's N tokens over the R ranks that hold its experts, T = N / R each."""

    mesh: Mesh
    num_experts: int

    def original_order(self, tokens: int) -> Order:
        """Returns the tokens' original order.

        tokens: number of tokens in all data groups.
        """
        groups = self.mesh.shape[DATA]
        token_N = jnp.tile(jnp.arange(tokens // groups, dtype=jnp.int32), groups)
        return Order(token_N, token_N)

    def order(self, hints: Hints, ids_N: Int[Array, " N"], valid_N: Bool[Array, " N"]) -> Order:
        """Predicts the order of every data group."""

        def of_group(tables: ShuffleTables, history_N2: Array | None, ids_N: Array, valid_N: Array) -> Order:
            return align(expected_shares(Hints(tables, history_N2), ids_N), valid_N)

        run = self._sharded(of_group, (PartitionSpec(), GROUP, GROUP, GROUP), GROUP)
        return run(hints.tables, hints.history_N2, ids_N, valid_N)

    def deal(self, arrays: Any, order: Order) -> Any:
        """Returns each rank's rows of arrays ``[N, ...]`` that every rank of the group has completely;
        nothing is sent."""

        def mine(arrays: Any, order: Order) -> Any:
            token_T = _local_rows(order.token_N)
            return jax.tree.map(lambda a: a[token_T], arrays)

        return self._sharded(mine, (GROUP, GROUP), ROWS)(arrays, order)

    def move(self, rows_ND: Float[Array, "N D"], move: Move) -> Float[Array, "N D"]:
        """Returns each rank's rows in the order ``move.new_order``, bit for bit; only rows whose rank changes
        are sent."""
        exchange = get_exchange(platform_of(self.mesh), EXPERT)
        return self._sharded(partial(_exchange_rows, exchange=exchange), (ROWS, GROUP), ROWS)(rows_ND, move)

    def gather_original(self, rows: Any, order: Order) -> Any:
        """Gathers arrays of rows to every rank of the group, in the tokens' original order."""

        def of_group(rows: Any, order: Order) -> Any:
            return jax.tree.map(lambda a: lax.all_gather(a, EXPERT, tiled=True)[order.row_N], rows)

        return self._sharded(of_group, (ROWS, GROUP), GROUP)(rows, order)

    def report(
        self, out: MoEOutput, order: Order, *, history: bool
    ) -> tuple[MoEOutput, Int[Array, " N"] | None]:
        """Gathers each token's changes and, for ``history``, its experts' rank to every rank of the group, in
        the tokens' original order. It takes one collective of a few integers per token, or none if there is
        nothing to report."""
        ranks = self.mesh.shape[EXPERT]
        rank_N = majority_rank(out.routing.ids_TK, self.num_experts // ranks, ranks) if history else None
        reported, structure = jax.tree.flatten((rank_N, out.changes))
        if not reported:
            return out, None

        def of_group(reported: list[Array], order: Order) -> list[Array]:
            whole_NC = lax.all_gather(jnp.stack(reported, axis=1), EXPERT, tiled=True)[order.row_N]
            return [whole_NC[:, i] for i in range(len(reported))]

        reported = self._sharded(of_group, (ROWS, GROUP), GROUP)(reported, order)
        rank_N, changes = jax.tree.unflatten(structure, reported)
        return replace(out, changes=changes), rank_N

    def _sharded(self, run: Callable, in_specs: tuple, out_specs: PartitionSpec) -> Callable:
        return jax.shard_map(run, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _local_rows(array_N: Int[Array, " N"]) -> Int[Array, " T"]:
    """Returns this rank's rows of an array that every rank of the group has completely."""
    each = array_N.shape[0] // lax.axis_size(EXPERT)
    return lax.dynamic_slice_in_dim(array_N, lax.axis_index(EXPERT) * each, each)


def _exchange_rows(rows_TD: Float[Array, "T D"], move: Move, *, exchange: Exchange) -> Float[Array, "T D"]:
    """Moves rows between ranks. Rows leave sorted by their new row number, so that the rows of one sender
    also arrive in order."""
    each, ranks, me = rows_TD.shape[0], lax.axis_size(EXPERT), lax.axis_index(EXPERT)
    from_N, to_N = move.old_order.row_N // each, move.new_order.row_N // each
    sizes_RR = jnp.bincount(from_N * ranks + to_N, length=ranks**2).reshape(ranks, ranks)
    leaving_T = jnp.argsort(move.new_order.row_N[_local_rows(move.old_order.token_N)])
    got_TD = exchange(
        rows_TD[leaving_T], jnp.zeros_like(rows_TD),
        starts(sizes_RR, 1)[me], sizes_RR[me], starts(sizes_RR, 0)[me], sizes_RR[:, me],
    )  # fmt: skip
    arrived_T = jnp.argsort(from_N[_local_rows(move.new_order.token_N)])  # stable: sender after sender
    return got_TD[jnp.argsort(arrived_T)]
