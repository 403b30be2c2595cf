"""MoELayer: route -> bin -> limit -> dispatch -> experts -> combine, in one ``shard_map``.

Tokens come split over ``data`` and ``expert``; experts are split over ``expert`` and their inner dimension
over ``tensor``. The gate runs inside the shard.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float
from jmoe_kernels.binning import Rule, supports
from jmoe_kernels.choice import Kernels
from jmoe_kernels.grouped_mlp import ExpertWeights, grouped_mlp

from jmoe.config.model import ModelConfig, MoEConfig
from jmoe.config.techniques import CapacityConfig
from jmoe.mesh import EXPERT, TENSOR, TOKENS, check_divides, is_single
from jmoe.moe import transport
from jmoe.moe.binning import bin_assignments, get_rule, route_binned
from jmoe.moe.capacity import limit
from jmoe.moe.counting import count_changes, count_dispatch, over_shards
from jmoe.moe.experts import ApplyBy, Experts, apply_experts, biased_once
from jmoe.moe.router import Router, RouterWeights, choose, router_logits
from jmoe.moe.types import (
    CapacityCounts,
    Changes,
    Computed,
    DispatchPlan,
    DispatchStats,
    ExpertSource,
    Knobs,
    LocalExperts,
    MoEOutput,
    Phase,
    Routing,
    Send,
    TokenFlags,
    Traffic,
)
from jmoe.param import ParamMaker


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
    if moe.offload is not None:
        moe.offload.check_mesh(dict(mesh.shape))


class Decision(NamedTuple):
    """plain: the router's own choice. final: what is computed, the same object where nothing lossy is on."""

    plain: Routing
    final: Routing
    changes: Changes | None


def count_alone(routed: Decision, tokens: TokenFlags) -> DispatchStats:
    """What a layer on one device will do with its tokens: nothing is computed yet."""
    none = jnp.zeros((), jnp.int32)
    return count_dispatch(
        routed.plain, routed.final, tokens.valid_T, routed.changes, Traffic(none, none, none), None
    )


class MoELayer(nnx.Module):
    """A sparse MLP: every token through its k experts of E.

    router: what scores the experts. experts: None where they are offloaded and come with every call. Raises
    ValueError where the mesh does not divide the experts or their inner dimension.
    """

    def __init__(self, cfg: ModelConfig, moe: MoEConfig, mesh: Mesh, make: ParamMaker, kernels: Kernels):
        check_divides("experts", cfg.num_experts, EXPERT, mesh.shape[EXPERT])
        check_techniques(cfg, moe, mesh)
        check_divides("expert inner size", cfg.moe_intermediate_size, TENSOR, mesh.shape[TENSOR])
        self.router = Router(cfg, make)
        self.experts = Experts(cfg, make) if moe.offload is None else None
        self.apply = ApplyBy(kernels, cfg.hidden_act, cfg.router.weigh_input, mesh.shape[TENSOR])
        self.cfg, self.moe, self.mesh, self.kernels = cfg, moe, mesh, kernels

    def __call__(
        self,
        x_TD: Float[Array, "T D"],
        tokens: TokenFlags,
        phase: Phase = "prefill",
        knobs: Knobs | None = None,
        source: ExpertSource | None = None,
    ) -> MoEOutput:
        """The experts' combined output, and what was done.

        phase: "decode" where every token of the step is one that a sequence was continued with.
        knobs: None switches the lossy techniques off, as does a phase in which they are not configured;
        then there are no changes to tell. source: of the experts where they are offloaded.
        """
        if self.experts is not None:
            held, specs = self.experts.weights, self.experts.specs
        else:
            assert source is not None, "experts that are not here come from a source"
            held, specs = source, source.specs
        split, whole = PartitionSpec(TOKENS), PartitionSpec()
        run = partial(self._shard, phase=phase, decide=self._decider(phase, knobs))
        given = x_TD, tokens, knobs, self.router.weights, held
        if is_single(self.mesh):
            return run(*given, send=transport.local)
        run = jax.shard_map(
            partial(run, send=transport.get_transport(self.moe.transport, self.kernels.platform)),
            mesh=self.mesh,
            in_specs=(split, split, whole, whole, specs),
            out_specs=MoEOutput(split, split, whole, split, None if source is None else specs),  # pyright: ignore[reportArgumentType]
            check_vma=False,
        )
        return run(*given)

    def _shard(
        self,
        x_TD: Array,
        tokens: TokenFlags,
        knobs: Knobs | None,
        router: RouterWeights,
        held: ExpertWeights | ExpertSource,
        *,
        phase: Phase,
        send: Send,
        decide: Callable[..., Decision],
    ) -> MoEOutput:
        """One rank's tokens through the experts of all ranks. held: this rank's, or where they come from."""
        source = None if isinstance(held, ExpertWeights) else held
        routed = decide(x_TD, tokens, knobs, router, here_E=None if source is None else source.resident_E)
        train_capacity, cached = self._train_capacity(x_TD.shape[0]), {}
        with jax.named_scope("experts"):
            if isinstance(held, ExpertWeights):
                experts = self._local_experts(held, train_capacity)
                y_TD, traffic = send(x_TD, routed.final, tokens.valid_T, experts)
            else:
                y_TD, traffic, cached, source = held.run(
                    x_TD, routed.plain, routed.final, tokens.valid_T, phase, self.apply, send
                )
        stats = count_dispatch(
            routed.plain, routed.final, tokens.valid_T, routed.changes, traffic, train_capacity
        )
        if not is_single(self.mesh):
            with jax.named_scope("combine"):
                y_TD = lax.psum(y_TD, TENSOR)
            stats = over_shards(stats, routed.final, tokens.valid_T)
        stats = replace(stats, counts=stats.counts | cached)
        return MoEOutput(y_TD, routed.plain, stats, routed.changes, source)

    def decide(
        self, x_TD: Array, tokens: TokenFlags, knobs: Knobs | None, phase: Phase, here_E: Array | None
    ) -> Decision:
        """Where tokens go on one device that has some of the experts, ``here_E``, or cannot say which."""
        return self._decider(phase, knobs)(x_TD, tokens, knobs, self.router.weights, here_E=here_E)

    def _decider(self, phase: Phase, knobs: Knobs | None) -> Callable[..., Decision]:
        """``_decide`` with the techniques that are on in the phase."""
        bin_by, limit_by = (None, None) if knobs is None else (self.moe.binning, self.moe.capacity)
        rule = None
        if bin_by is not None and phase == "decode":
            rule = get_rule(bin_by, self.cfg.num_experts_per_tok)
        if limit_by is not None and limit_by.phase not in (phase, "both"):
            limit_by = None
        return partial(self._decide, rule=rule, limit_by=limit_by)

    def _decide(
        self,
        x_TD: Array,
        tokens: TokenFlags,
        knobs: Knobs | None,
        router: RouterWeights,
        *,
        rule: Rule | None,
        limit_by: CapacityConfig | None,
        here_E: Array | None,
    ) -> Decision:
        """Where tokens go: the router's word, then the lossy techniques'. here_E: which experts are on a
        device, where not all are."""
        with jax.named_scope("route"):
            logits_TE = router_logits(x_TD, router, self.kernels.dense)
            plain, routing, remapped_T = self._route(logits_TE, router, tokens, rule, knobs, here_E)
        limited = None
        if limit_by is not None and knobs is not None:
            limited_ones = tokens if limit_by.phase == "both" else tokens.sparing_decoded()
            with jax.named_scope("capacity"):
                routing, limited = self._limit(routing, limited_ones, limit_by, knobs)
        return Decision(plain, routing, count_changes(remapped_T, limited))

    def _route(
        self,
        logits_TE: Array,
        router: RouterWeights,
        tokens: TokenFlags,
        rule: Rule | None,
        knobs: Knobs | None,
        here_E: Array | None,
    ) -> tuple[Routing, Routing, Array | None]:
        """The router's own choice, the binned one (the same object without a rule), and what moved."""
        if rule is not None and self._fuses(rule, *logits_TE.shape):
            return route_binned(
                logits_TE, tokens, rule,
                renormalize=self.cfg.router.norm_topk_prob,
                implementation=self.kernels.binning, platform=self.kernels.platform,
                total=self._sum_votes(),
            )  # fmt: skip
        plain = choose(logits_TE, router, self.cfg)
        if rule is None or knobs is None:
            return plain, plain, None
        with jax.named_scope("bin"):
            total, bonus_E = self._sum_votes(), self._bonus(here_E)
            return plain, *bin_assignments(plain, tokens, rule, seed=knobs.seed, total=total, bonus_E=bonus_E)

    def _fuses(self, rule: Rule, tokens: int, experts: int) -> bool:
        """Whether one kernel routes and bins; not where a rank has more tokens than it takes."""
        name, platform = self.kernels.binning, self.kernels.platform
        if name == "xla" or not self.cfg.router.is_plain:
            return False
        return supports(name, platform, experts, rule, tokens=tokens) is None

    def _bonus(self, here_E: Array | None) -> Array | None:
        """Nats by which a token likes each expert more than its router says; None where it does nowhere."""
        cfg, experts, bonus_E = self.moe.binning, self.cfg.num_experts, None
        if cfg is not None and cfg.resident_bonus and here_E is not None:
            bonus_E = jnp.where(here_E, jnp.float32(cfg.resident_bonus), 0.0)
        if cfg is None or not cfg.local_bonus:
            return bonus_E
        held = experts // self.mesh.shape[EXPERT]
        own_E = jnp.arange(experts, dtype=jnp.int32) // held == lax.axis_index(EXPERT)
        local_E = jnp.where(own_E, jnp.float32(cfg.local_bonus), 0.0)
        return local_E if bonus_E is None else bonus_E + local_E

    def _sum_votes(self) -> Callable[[Array], Array] | None:
        """Sums over the ranks that read the same experts' weights."""
        return partial(lax.psum, axis_name=EXPERT) if self.mesh.shape[EXPERT] > 1 else None

    def _limit(
        self, routing: Routing, tokens: TokenFlags, cfg: CapacityConfig, knobs: Knobs
    ) -> tuple[Routing, CapacityCounts]:
        """The routing within the limit of this shard's tokens."""
        held = self.cfg.num_experts // self.mesh.shape[EXPERT]
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
            "activation": self.cfg.hidden_act,
        }
        weights = biased_once(weights, self.mesh.shape[TENSOR])
        weigh_input = self.cfg.router.weigh_input

        def combined(x_TD: Array, weights_TJ: Array, plan: DispatchPlan) -> Computed:
            y_TD = apply_experts(x_TD, weights_TJ, plan, weights, weigh_input=weigh_input, **how)
            return Computed(y_TD, plan.rows)

        def by_row(rows_ND: Array, group_sizes_L: Array) -> Computed:
            y_ND = grouped_mlp(rows_ND, weights, group_sizes_L, **how)
            return Computed(y_ND, jnp.sum(group_sizes_L, dtype=jnp.int32))

        return LocalExperts(weights.dims[0], weights.dtype, combined, by_row, weigh_input)

    def _train_capacity(self, tokens: int) -> int | None:
        """Rows an expert in the training form: its even share of the batch times the factor."""
        if self.moe.train_capacity_factor is None:
            return None
        even = tokens * self.cfg.num_experts_per_tok / self.cfg.num_experts
        return -(-int(even * self.moe.train_capacity_factor) // 32) * 32
