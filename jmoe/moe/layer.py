"""MoELayer: route -> dispatch -> experts -> combine, in one ``shard_map``.

Tokens come split over ``data`` and ``expert``; experts are split over ``expert`` and their inner dimension
over ``tensor``. The gate runs inside the shard.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Bool, Float
from jmoe_kernels.choice import Kernels
from jmoe_kernels.grouped_mlp import ExpertWeights, grouped_mlp
from jmoe_kernels.matmul import linear

from jmoe.config import ModelConfig, MoEConfig
from jmoe.mesh import EXPERT, TENSOR, TOKENS, check_divides, is_single
from jmoe.moe import transport
from jmoe.moe.experts import Experts, apply_experts
from jmoe.moe.routing import expert_counts, route
from jmoe.moe.types import DispatchStats, LocalExperts, Routing, Traffic
from jmoe.nn.param import ParamMaker


class MoELayer(nnx.Module):
    """A sparse MLP: every token through its k experts of E.

    gate_ED: router weights ``[experts, model]``. Raises ValueError where the mesh does not divide the
    experts or their inner dimension.
    """

    def __init__(self, cfg: ModelConfig, moe: MoEConfig, mesh: Mesh, make: ParamMaker, kernels: Kernels):
        check_divides("experts", cfg.num_experts, EXPERT, mesh.shape[EXPERT])
        check_divides("expert inner size", cfg.moe_intermediate_size, TENSOR, mesh.shape[TENSOR])
        self.gate_ED = make((cfg.num_experts, cfg.hidden_size), (None, None))
        self.experts = Experts(cfg.num_experts, cfg.hidden_size, cfg.moe_intermediate_size, make)
        self.cfg, self.moe, self.mesh, self.kernels = cfg, moe, mesh, kernels

    def __call__(
        self, x_TD: Float[Array, "T D"], valid_T: Bool[Array, " T"]
    ) -> tuple[Float[Array, "T D"], DispatchStats]:
        """The experts' combined output in float32, zero for invalid tokens, and what was done."""
        weights = (self.gate_ED[...], self.experts.gate_up_E2FD[...], self.experts.down_EDF[...])
        if is_single(self.mesh):
            return self._shard(x_TD, valid_T, *weights, send=transport.local)
        tokens, whole = PartitionSpec(TOKENS), PartitionSpec()
        experts = PartitionSpec(EXPERT, None, TENSOR), PartitionSpec(EXPERT, None, TENSOR)
        send = transport.get_transport(self.moe.transport, self.kernels.platform)
        run = jax.shard_map(
            partial(self._shard, send=send),
            mesh=self.mesh,
            in_specs=(tokens, tokens, whole, *experts),
            out_specs=(tokens, whole),
            check_vma=False,
        )
        return run(x_TD, valid_T, *weights)

    def _shard(
        self,
        x_TD: Array,
        valid_T: Array,
        gate_ED: Array,
        gate_up: Array,
        down: Array,
        *,
        send: transport.Transport,
    ) -> tuple[Array, DispatchStats]:
        with jax.named_scope("route"):
            logits_TE = linear(x_TD, gate_ED, self.kernels.dense)
            routing = route(logits_TE, self.cfg.num_experts_per_tok, renormalize=self.cfg.norm_topk_prob)
        capacity = self._capacity(x_TD.shape[0])
        experts = self._local_experts(ExpertWeights(gate_up, down), capacity)
        with jax.named_scope("experts"):
            y_TD, traffic = send(x_TD, routing, valid_T, experts)
        if is_single(self.mesh):
            return y_TD, self._stats(routing, valid_T, capacity, traffic)
        with jax.named_scope("combine"):
            y_TD = lax.psum(y_TD, TENSOR)
        return y_TD, self._stats_over_shards(routing, valid_T, traffic)

    def _local_experts(self, weights: ExpertWeights, capacity: int | None) -> LocalExperts:
        how = {
            "implementation": self.kernels.experts,
            "platform": self.kernels.platform,
            "capacity": capacity,
        }
        combined = partial(apply_experts, experts=weights, **how)

        def by_row(rows_ND: Array, group_sizes_L: Array) -> Array:
            return grouped_mlp(rows_ND, weights, group_sizes_L, **how)

        return LocalExperts(weights.dims[0], weights.dtype, combined, by_row)

    def _capacity(self, tokens: int) -> int | None:
        """Rows an expert in the training form: its even share of the batch times the factor."""
        if self.moe.train_capacity_factor is None:
            return None
        even = tokens * self.cfg.num_experts_per_tok / self.cfg.num_experts
        return -(-int(even * self.moe.train_capacity_factor) // 32) * 32

    def _stats(
        self, routing: Routing, valid_T: Array, capacity: int | None, traffic: Traffic
    ) -> DispatchStats:
        counts_E = expert_counts(routing.ids_TK, valid_T, self.cfg.num_experts)
        tokens = jnp.maximum(jnp.sum(valid_T, dtype=jnp.float32), 1)
        mean_score_E = jnp.sum(jnp.where(valid_T[:, None], routing.scores_TE, 0.0), axis=0) / tokens
        over = 0 if capacity is None else jnp.sum(jnp.maximum(counts_E - capacity, 0))
        remote, dropped = jnp.zeros((), jnp.int32), jnp.asarray(over, jnp.int32)
        return DispatchStats(counts_E, mean_score_E, remote, dropped, traffic)

    def _stats_over_shards(self, routing: Routing, valid_T: Array, traffic: Traffic) -> DispatchStats:
        mine = self._stats(routing, valid_T, None, traffic)
        local_experts = self.cfg.num_experts // lax.axis_size(EXPERT)
        rank_TK = routing.ids_TK // local_experts  # an absent assignment's is R, which is no rank
        away = (rank_TK != lax.axis_index(EXPERT)) & (rank_TK < lax.axis_size(EXPERT)) & valid_T[:, None]
        total = partial(lax.psum, axis_name=TOKENS)
        tokens = jnp.sum(valid_T, dtype=jnp.float32)
        share = tokens / jnp.maximum(total(tokens), 1)
        return DispatchStats(
            total(mine.counts_E), total(mine.mean_score_E * share),
            total(jnp.sum(away, dtype=jnp.int32)), total(mine.dropped), total(traffic),
        )  # fmt: skip
