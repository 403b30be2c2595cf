"""MoELayer: route -> limit -> dispatch -> experts -> combine, in one ``shard_map``.

Tokens come split over ``data`` and ``expert``; experts are split over ``expert`` and their inner dimension
over ``tensor``. The gate runs inside the shard.
"""

from functools import partial
from typing import Literal

import jax
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float
from jmoe_kernels.choice import Kernels
from jmoe_kernels.grouped_mlp import ExpertWeights, grouped_mlp
from jmoe_kernels.matmul import linear

from jmoe.config import CapacityConfig, ModelConfig, MoEConfig
from jmoe.mesh import EXPERT, TENSOR, TOKENS, check_divides, is_single
from jmoe.moe import transport
from jmoe.moe.capacity import limit
from jmoe.moe.counting import count_dispatch, over_shards
from jmoe.moe.experts import Experts, apply_experts
from jmoe.moe.routing import route
from jmoe.moe.types import CapacityCounts, DispatchStats, Knobs, LocalExperts, Routing, TokenFlags
from jmoe.nn.param import ParamMaker

Phase = Literal["prefill", "decode"]


def check_capacity(moe: MoEConfig, mesh: Mesh) -> None:
    """Raises ValueError for a limit that means nothing on ``mesh``."""
    cfg, ranks = moe.capacity, mesh.shape[EXPERT]
    if cfg is None:
        return
    if moe.train_capacity_factor is not None:
        raise ValueError("moe.capacity and moe.train_capacity_factor exclude each other")
    for name, value in (("policy", cfg.policy), ("scope", cfg.scope)):
        if value in ("expand", "device") and ranks == 1:
            raise ValueError(
                f"moe.capacity.{name} = {value!r} needs experts on several devices: an expert parallel size "
                f"of 2 or more, got {ranks}"
            )


class MoELayer(nnx.Module):
    """A sparse MLP: every token through its k experts of E.

    gate_ED: router weights ``[experts, model]``. Raises ValueError where the mesh does not divide the
    experts or their inner dimension.
    """

    def __init__(self, cfg: ModelConfig, moe: MoEConfig, mesh: Mesh, make: ParamMaker, kernels: Kernels):
        check_divides("experts", cfg.num_experts, EXPERT, mesh.shape[EXPERT])
        check_capacity(moe, mesh)
        check_divides("expert inner size", cfg.moe_intermediate_size, TENSOR, mesh.shape[TENSOR])
        self.gate_ED = make((cfg.num_experts, cfg.hidden_size), (None, None))
        self.experts = Experts(cfg.num_experts, cfg.hidden_size, cfg.moe_intermediate_size, make)
        self.cfg, self.moe, self.mesh, self.kernels = cfg, moe, mesh, kernels

    def __call__(
        self,
        x_TD: Float[Array, "T D"],
        tokens: TokenFlags,
        phase: Phase = "prefill",
        knobs: Knobs | None = None,
    ) -> tuple[Float[Array, "T D"], DispatchStats, CapacityCounts | None]:
        """The experts' combined output in float32, zero for invalid tokens, and what was done.

        knobs: None switches the lossy techniques off, as does a phase in which they are not configured;
        then there are no counts of them.
        """
        limit_by = self.moe.capacity if knobs is not None else None
        if limit_by is not None and limit_by.phase not in (phase, "both"):
            limit_by = None
        weights = (self.gate_ED[...], self.experts.gate_up_E2FD[...], self.experts.down_EDF[...])
        if is_single(self.mesh):
            return self._shard(x_TD, tokens, knobs, *weights, send=transport.local, limit_by=limit_by)
        split, whole = PartitionSpec(TOKENS), PartitionSpec()
        experts = PartitionSpec(EXPERT, None, TENSOR), PartitionSpec(EXPERT, None, TENSOR)
        send = transport.get_transport(self.moe.transport, self.kernels.platform)
        run = jax.shard_map(
            partial(self._shard, send=send, limit_by=limit_by),
            mesh=self.mesh,
            in_specs=(split, split, whole, whole, *experts),
            out_specs=(split, whole, split),
            check_vma=False,
        )
        return run(x_TD, tokens, knobs, *weights)

    def _shard(
        self,
        x_TD: Array,
        tokens: TokenFlags,
        knobs: Knobs | None,
        gate_ED: Array,
        gate_up: Array,
        down: Array,
        *,
        send: transport.Transport,
        limit_by: CapacityConfig | None,
    ) -> tuple[Array, DispatchStats, CapacityCounts | None]:
        single, valid_T = is_single(self.mesh), tokens.valid_T
        with jax.named_scope("route"):
            logits_TE = linear(x_TD, gate_ED, self.kernels.dense)
            plain = route(logits_TE, self.cfg.num_experts_per_tok, renormalize=self.cfg.norm_topk_prob)
        train_capacity = self._train_capacity(x_TD.shape[0])
        experts = self._local_experts(ExpertWeights(gate_up, down), train_capacity)
        routing, limited = plain, None
        if limit_by is not None and knobs is not None:
            with jax.named_scope("capacity"):
                routing, limited = self._limit(plain, tokens, limit_by, knobs, experts.count)
        with jax.named_scope("experts"):
            y_TD, traffic = send(x_TD, routing, valid_T, experts)
        stats = count_dispatch(plain, routing, valid_T, limited, traffic, train_capacity)
        if single:
            return y_TD, stats, limited
        with jax.named_scope("combine"):
            y_TD = lax.psum(y_TD, TENSOR)
        return y_TD, over_shards(stats, routing, valid_T), limited

    def _limit(
        self, plain: Routing, tokens: TokenFlags, cfg: CapacityConfig, knobs: Knobs, held: int
    ) -> tuple[Routing, CapacityCounts]:
        """The routing within the limit of this shard's tokens."""
        if is_single(self.mesh):
            return limit(plain, tokens, cfg, factor=knobs.factor, local=(0, held), seed=knobs.seed)
        return limit(
            plain, tokens, cfg,
            factor=knobs.factor,
            local=(lax.axis_index(EXPERT) * held, held),
            seed=knobs.of(lax.axis_index(TOKENS)).seed,
            total=partial(lax.psum, axis_name=TOKENS),
        )  # fmt: skip

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

    def _train_capacity(self, tokens: int) -> int | None:
        """Rows an expert in the training form: its even share of the batch times the factor."""
        if self.moe.train_capacity_factor is None:
            return None
        even = tokens * self.cfg.num_experts_per_tok / self.cfg.num_experts
        return -(-int(even * self.moe.train_capacity_factor) // 32) * 32
