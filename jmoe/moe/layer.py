"""MoELayer: decide -> dispatch -> experts -> combine, in one ``shard_map``.

Tokens come split over ``data`` and ``expert``; experts are split over ``expert`` and their inner dimension
over ``tensor``. The gate runs inside the shard.
"""

from dataclasses import replace
from functools import partial

import jax
from flax import nnx
from jax import Array, lax
from jax.sharding import PartitionSpec
from jaxtyping import Float

from jmoe.blueprint import Blueprint
from jmoe.config.techniques import Phase
from jmoe.mesh import EXPERT, TENSOR, TOKENS, check_divides, is_single
from jmoe.moe import transport
from jmoe.moe.counting import count_dispatch, sum_over_shards
from jmoe.moe.decide import Decider, Decision, check_stages
from jmoe.moe.experts import ExpertMath, Experts
from jmoe.moe.routing import Router, RouterWeights
from jmoe.moe.types import ExpertSource, Knobs, MoEOutput, Send, TokenFlags
from jmoe.param import ParamMaker


class MoELayer(nnx.Module):
    """A sparse MLP: every token passes through k of the E experts.

    router: scores the experts.
    experts: experts' weights; None if they are offloaded, then a source is passed to every call.

    Raises ValueError if the mesh does not divide the experts or their inner dimension.
    """

    def __init__(self, blueprint: Blueprint, make: ParamMaker):
        cfg, moe, mesh, kernels = blueprint.cfg, blueprint.moe, blueprint.mesh, blueprint.kernels
        check_divides("experts", cfg.num_experts, EXPERT, mesh.shape[EXPERT])
        check_stages(blueprint)
        if moe.offload is not None:
            moe.offload.check_mesh(dict(mesh.shape))
        check_divides("expert inner size", cfg.moe_intermediate_size, TENSOR, mesh.shape[TENSOR])
        self.router = Router(cfg, make)
        self.experts = Experts(cfg, make) if moe.offload is None else None
        self.math = ExpertMath(
            kernels.experts, kernels.platform, cfg.hidden_act, cfg.router.weigh_input, mesh.shape[TENSOR],
            activations=kernels.activations,
        )  # fmt: skip
        self.decider = Decider(blueprint)
        self.cfg, self.moe, self.mesh, self.kernels = cfg, moe, mesh, kernels

    def __call__(
        self,
        x_TD: Float[Array, "T D"],
        tokens: TokenFlags,
        phase: Phase = "prefill",
        knobs: Knobs | None = None,
        source: ExpertSource | None = None,
    ) -> MoEOutput:
        """Computes the experts' combined output and counts what was done.

        phase: "decode" if every token of the step is a sampled token that continues its sequence.
        knobs: None switches the lossy techniques off, as does a phase in which they are not configured; then
            no changes are reported.
        source: source of the experts if they are offloaded.
        """
        if self.experts is not None:
            source = self.experts.source
        assert source is not None, "experts that are not here come from a source"
        split, whole = PartitionSpec(TOKENS), PartitionSpec()
        run = partial(self._shard, phase=phase)
        args = x_TD, tokens, knobs, self.router.weights, source
        if is_single(self.mesh):
            return run(*args, send=transport.local)
        run = jax.shard_map(
            partial(run, send=transport.get_transport(self.moe.transport, self.kernels.platform)),
            mesh=self.mesh,
            in_specs=(split, split, whole, whole, source.specs),
            out_specs=MoEOutput(split, split, whole, split, source.next_specs),  # pyright: ignore[reportArgumentType]
            check_vma=False,
        )
        return run(*args)

    def _shard(
        self,
        x_TD: Array,
        tokens: TokenFlags,
        knobs: Knobs | None,
        router: RouterWeights,
        source: ExpertSource,
        *,
        phase: Phase,
        send: Send,
    ) -> MoEOutput:
        """Runs one rank's tokens through the experts of all ranks.

        source: source of this rank's experts.
        """
        decision = self.decider(x_TD, tokens, phase, knobs, router, source.resident_E)
        plain, final = decision.plain_routing, decision.final_routing
        max_rows = self._max_rows(x_TD.shape[0])
        math = replace(self.math, max_rows=max_rows)
        with jax.named_scope("experts"):
            y_TD, traffic, counts, next_source = source.run(
                x_TD, plain, final, tokens.valid_T, phase, math, send
            )
        stats = count_dispatch(plain, final, tokens.valid_T, decision.changes, traffic, max_rows)
        if not is_single(self.mesh):
            with jax.named_scope("combine"):
                y_TD = lax.psum(y_TD, TENSOR)
            stats = sum_over_shards(stats, final, tokens.valid_T)
        stats = replace(stats, counts=stats.counts | counts)
        return MoEOutput(y_TD, plain, stats, decision.changes, next_source)

    def decide(
        self, x_TD: Array, tokens: TokenFlags, knobs: Knobs | None, phase: Phase, resident_E: Array | None
    ) -> Decision:
        """Decides where tokens go, on one device.

        resident_E: experts on the device; None if they are not known.
        """
        return self.decider(x_TD, tokens, phase, knobs, self.router.weights, resident_E)

    def _max_rows(self, tokens: int) -> int | None:
        """Returns the rows of one expert in the training form: its even share of the batch times the factor,
        rounded up to a multiple of 32. Without a factor it returns None."""
        if self.moe.train_capacity_factor is None:
            return None
        even = tokens * self.cfg.num_experts_per_tok / self.cfg.num_experts
        return -(-int(even * self.moe.train_capacity_factor) // 32) * 32
