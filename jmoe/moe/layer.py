"""MoELayer: route -> bin -> limit -> dispatch -> experts -> combine, in one ``shard_map``.

Tokens come split over ``data`` and ``expert``; experts are split over ``expert`` and their inner dimension
over ``tensor``. The gate runs inside the shard.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float
from jmoe_kernels.binning import Rule, supports
from jmoe_kernels.choice import Kernels
from jmoe_kernels.grouped_mlp import ExpertWeights, grouped_mlp
from jmoe_kernels.matmul import linear

from jmoe.config import ModelConfig, MoEConfig
from jmoe.mesh import EXPERT, TENSOR, TOKENS, check_divides, is_single
from jmoe.moe import transport
from jmoe.moe.binning import bin_assignments, get_rule, route_binned
from jmoe.moe.capacity import limit
from jmoe.moe.counting import count_changes, count_dispatch, over_shards
from jmoe.moe.experts import Experts, apply_experts
from jmoe.moe.routing import route
from jmoe.moe.types import CapacityCounts, Knobs, LocalExperts, MoEOutput, Routing, TokenFlags
from jmoe.nn.param import ParamMaker
from jmoe.techniques import CapacityConfig

Phase = Literal["prefill", "decode"]


def check_techniques(cfg: ModelConfig, moe: MoEConfig, mesh: Mesh) -> None:
    """Raises ValueError for a technique that means nothing for the model or on ``mesh``."""
    for name in ("binning", "capacity"):
        if getattr(moe, name) is not None and moe.train_capacity_factor is not None:
            raise ValueError(f"moe.{name} and moe.train_capacity_factor exclude each other")
    if moe.binning is not None:
        moe.binning.check_model(cfg.num_experts, cfg.num_experts_per_tok)
        moe.binning.check_ranks(mesh.shape[EXPERT])
    if moe.capacity is not None:
        moe.capacity.check_ranks(mesh.shape[EXPERT])


class MoELayer(nnx.Module):
    """A sparse MLP: every token through its k experts of E.

    gate_ED: router weights ``[experts, model]``. Raises ValueError where the mesh does not divide the
    experts or their inner dimension.
    """

    def __init__(self, cfg: ModelConfig, moe: MoEConfig, mesh: Mesh, make: ParamMaker, kernels: Kernels):
        check_divides("experts", cfg.num_experts, EXPERT, mesh.shape[EXPERT])
        check_techniques(cfg, moe, mesh)
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
    ) -> MoEOutput:
        """The experts' combined output, and what was done.

        phase: "decode" where every token of the step is one that a sequence was continued with.
        knobs: None switches the lossy techniques off, as does a phase in which they are not configured;
        then there are no changes to tell.
        """
        bin_by, limit_by = (None, None) if knobs is None else (self.moe.binning, self.moe.capacity)
        rule = None
        if bin_by is not None and phase == "decode":
            rule = get_rule(bin_by, self.cfg.num_experts_per_tok)
        if limit_by is not None and limit_by.phase not in (phase, "both"):
            limit_by = None
        weights = (self.gate_ED[...], self.experts.gate_up_E2FD[...], self.experts.down_EDF[...])
        if is_single(self.mesh):
            return self._shard(
                x_TD, tokens, knobs, *weights, send=transport.local, rule=rule, limit_by=limit_by
            )
        split, whole = PartitionSpec(TOKENS), PartitionSpec()
        experts = PartitionSpec(EXPERT, None, TENSOR), PartitionSpec(EXPERT, None, TENSOR)
        send = transport.get_transport(self.moe.transport, self.kernels.platform)
        run = jax.shard_map(
            partial(self._shard, send=send, rule=rule, limit_by=limit_by),
            mesh=self.mesh,
            in_specs=(split, split, whole, whole, *experts),
            out_specs=MoEOutput(split, split, whole, split),  # pyright: ignore[reportArgumentType]
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
        rule: Rule | None,
        limit_by: CapacityConfig | None,
    ) -> MoEOutput:
        with jax.named_scope("route"):
            logits_TE = linear(x_TD, gate_ED, self.kernels.dense)
            plain, routing, remapped_T = self._route(logits_TE, tokens, rule, knobs)
        train_capacity = self._train_capacity(x_TD.shape[0])
        experts = self._local_experts(ExpertWeights(gate_up, down), train_capacity)
        limited = None
        if limit_by is not None and knobs is not None:
            with jax.named_scope("capacity"):
                routing, limited = self._limit(routing, tokens, limit_by, knobs, experts.count)
        with jax.named_scope("experts"):
            y_TD, traffic = send(x_TD, routing, tokens.valid_T, experts)
        changes = count_changes(remapped_T, limited)
        stats = count_dispatch(plain, routing, tokens.valid_T, changes, traffic, train_capacity)
        if is_single(self.mesh):
            return MoEOutput(y_TD, plain, stats, changes)
        with jax.named_scope("combine"):
            y_TD = lax.psum(y_TD, TENSOR)
        return MoEOutput(y_TD, plain, over_shards(stats, routing, tokens.valid_T), changes)

    def _route(
        self, logits_TE: Array, tokens: TokenFlags, rule: Rule | None, knobs: Knobs | None
    ) -> tuple[Routing, Routing, Array | None]:
        """The router's own choice, the binned one (the same object without a rule), and what moved."""
        renormalize = self.cfg.norm_topk_prob
        if rule is not None and self._fuses(rule, *logits_TE.shape):
            return route_binned(
                logits_TE, tokens, rule,
                renormalize=renormalize,
                implementation=self.kernels.binning, platform=self.kernels.platform,
                total=self._sum_votes(),
            )  # fmt: skip
        plain = route(logits_TE, self.cfg.num_experts_per_tok, renormalize=renormalize)
        if rule is None or knobs is None:
            return plain, plain, None
        with jax.named_scope("bin"):
            total, local = self._sum_votes(), self._own_experts()
            return plain, *bin_assignments(plain, tokens, rule, seed=knobs.seed, total=total, local=local)

    def _fuses(self, rule: Rule, tokens: int, experts: int) -> bool:
        """Whether one kernel routes and bins; not where a rank has more tokens than it takes."""
        name, platform = self.kernels.binning, self.kernels.platform
        return name != "xla" and supports(name, platform, experts, rule, tokens=tokens) is None

    def _own_experts(self) -> tuple[float, Array, int] | None:
        """The bonus of this rank's experts, the first of them and their number; None without a bonus."""
        if self.moe.binning is None or not self.moe.binning.local_bonus:
            return None
        held = self.cfg.num_experts // self.mesh.shape[EXPERT]
        return self.moe.binning.local_bonus, lax.axis_index(EXPERT) * held, held

    def _sum_votes(self) -> Callable[[Array], Array] | None:
        """Sums over the ranks that read the same experts' weights."""
        return partial(lax.psum, axis_name=EXPERT) if self.mesh.shape[EXPERT] > 1 else None

    def _limit(
        self, routing: Routing, tokens: TokenFlags, cfg: CapacityConfig, knobs: Knobs, held: int
    ) -> tuple[Routing, CapacityCounts]:
        """The routing within the limit of this shard's tokens."""
        if is_single(self.mesh):
            return limit(routing, tokens, cfg, factor=knobs.factor, local=(0, held), seed=knobs.seed)
        return limit(
            routing, tokens, cfg,
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
