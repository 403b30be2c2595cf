"""Counts what a layer did: Routing before and after the lossy stages -> DispatchStats."""

from functools import partial

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Int

from jmoe.config.counters import LOSSY, names
from jmoe.mesh import EXPERT, TOKENS
from jmoe.moe.types import Changes, DispatchStats, Routing, Traffic


def expert_counts(ids_TJ: Int[Array, "T J"], valid_T: Bool[Array, " T"], experts: int) -> Int[Array, " E"]:
    """Returns the number of assignments of valid tokens to each expert."""
    keys = jnp.where(valid_T[:, None], ids_TJ, experts)
    return jnp.bincount(keys.reshape(-1), length=experts).astype(jnp.int32)


def add_changes(first: Changes, second: Changes) -> Changes:
    """Returns the sum of what two stages changed; both may count by the same name."""
    return first | {name: n_T + first[name] if name in first else n_T for name, n_T in second.items()}


def count_changes(changes: Changes) -> Changes | None:
    """Returns what the lossy stages did to each token, with zeros for stages that are off, or None if none
    acted."""
    if not changes:
        return None
    none_T = jnp.zeros_like(next(iter(changes.values())))
    return dict.fromkeys(names(LOSSY), none_T) | changes


def count_dispatch(
    plain_routing: Routing,
    routing: Routing,
    valid_T: Bool[Array, " T"],
    changes: Changes | None,
    traffic: Traffic,
    max_rows: int | None,
) -> DispatchStats:
    """Counts what one shard did.

    plain_routing: own choice of the router.
    routing: routing that was dispatched; the same object as ``plain_routing`` if nothing lossy was on.
    changes: what lossy stages changed for each token.
    traffic: rows that the shard moved.
    max_rows: the most rows that an expert of the training form computes.
    """
    experts = plain_routing.scores_TE.shape[1]
    counts_E = expert_counts(routing.ids_TK, valid_T, experts)
    plain_counts_E = counts_E
    if routing is not plain_routing:
        plain_counts_E = expert_counts(plain_routing.ids_TK, valid_T, experts)
    tokens = jnp.maximum(jnp.sum(valid_T, dtype=jnp.float32), 1)
    mean_score_E = jnp.sum(jnp.where(valid_T[:, None], plain_routing.scores_TE, 0.0), axis=0) / tokens
    counts = dict.fromkeys((*names(LOSSY), "remote_assignments"), jnp.zeros((), jnp.int32))
    if changes is not None:
        counts |= {name: jnp.sum(changed_T) for name, changed_T in changes.items()}
    if max_rows is not None:
        counts["dropped"] += jnp.sum(jnp.maximum(counts_E - max_rows, 0))
    return DispatchStats(counts_E, plain_counts_E, mean_score_E, traffic, counts)


def sum_over_shards(stats: DispatchStats, routing: Routing, valid_T: Bool[Array, " T"]) -> DispatchStats:
    """Returns the sum over the shards that hold tokens. It runs inside ``shard_map``, and every shard gets
    the sum."""
    local_experts = stats.counts_E.shape[0] // lax.axis_size(EXPERT)
    rank_TJ = routing.ids_TK // local_experts  # R, which is no rank, for an absent assignment
    away_TJ = (rank_TJ != lax.axis_index(EXPERT)) & (rank_TJ < lax.axis_size(EXPERT)) & valid_T[:, None]
    total = partial(lax.psum, axis_name=TOKENS)
    tokens = jnp.sum(valid_T, dtype=jnp.float32)
    share = tokens / jnp.maximum(total(tokens), 1)
    counts = stats.counts | {"remote_assignments": jnp.sum(away_TJ, dtype=jnp.int32)}
    return DispatchStats(
        total(stats.counts_E), total(stats.plain_counts_E), total(stats.mean_score_E * share),
        total(stats.traffic), total(counts),
    )  # fmt: skip
