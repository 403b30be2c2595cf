"""LYNX, batch-aware affinity binning: a decode batch uses fewer experts, so that fewer weights are read.

Source: Gupta et al., "LYNX" (arXiv 2411.08982, AffinityBinning). A memory-bound decode step takes as long as
reading the experts that its batch touches, which are nearly all. An expert that no token prefers much is left
out, and its tokens go to experts that are read anyway. This is decided per layer and step, without
calibration, in steps of decode tokens only. The stage is pure: ``Routing x TokenFlags -> Routing x remapped
assignments of each token``; it runs after routing and before the capacity.

**Affinity** of a token for an expert it chose: how far the expert's logit lies below the token's best one, in
nats, in bins of ``bin_width``; bin 0 is the nearest. **Votes**: an expert's count of choices by bin; experts
rank by votes in bin 0, then in bin 1, and so on (exactly the paper's base-B score); ties go to the lower id.

**Active set** (``method``).
``affinity``    R1: experts in bin 0 of some token, or in bin 1 of all tokens; every token's best survives.
``oea``         experts among the first ``k0`` choices of some token (Oncescu et al., arXiv 2511.02237).
``budget``      R2: the ``keep`` share of the batch's union that ranks highest; a token may lose its best.
``popularity``  baseline: the same share, by votes of any affinity (the "subtractive" rule of early LYNX).
``random``      baseline: the same share, drawn at random.
All methods keep at least k experts, so that every token has k distinct ones and a batch of one is unchanged.

**Preference** (our addition): before all of this, a token chooses its experts again with a bonus in nats for
some of them; its weights still come from its own scores. ``local_bonus`` prefers experts of the token's own
rank under expert parallelism, so that fewer rows travel; ``resident_bonus`` prefers experts that are on the
device when experts are offloaded.

**Remapping**: choices outside the set are replaced in place by the token's best-scored experts within it. A
token that lost any choice takes its scores as weights, scaled to its previous sum of weights; other tokens
keep their weights bit for bit. The scores of experts outside the set become 0, so that a later capacity stage
reroutes nothing to them.

Padding and exact tokens do not vote and are not remapped; the experts of exact tokens are always active.
Ranks of the ``expert`` axis read the same weights, so their votes are summed; each ``data`` replica bins
separately.

The paper publishes neither its score's formula nor how the set's size follows from it; R1 and R2 are our
reading. Config keys: ``[moe.binning]`` (``jmoe.config.techniques.BinningConfig``). Counters: ``remapped`` of
``DispatchStats`` and ``Changes``. The array code is ``jmoe_kernels.binning``, whose fused kernels compute the
sorted assignments from the logits in one pass (``route_binned``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int
from jmoe_kernels import binning

from jmoe.config.model import ModelConfig
from jmoe.config.techniques import BinningConfig, Phase
from jmoe.mesh import EXPERT
from jmoe.moe.stage import Stage
from jmoe.moe.types import Changes, DispatchPlan, Knobs, Routing, TokenFlags


@dataclass(frozen=True)
class Binning(Stage):
    """The binning stage of one layer."""

    table: BinningConfig

    def acts_in(self, phase: Phase) -> bool:
        return phase == "decode"

    def __call__(
        self, plain_routing: Routing, tokens: TokenFlags, knobs: Knobs, resident_E: Array | None
    ) -> tuple[Routing, Changes]:
        """Returns the routing on the active set, and the changes.

        resident_E: which experts are on a device; None if all are.
        """
        with jax.named_scope("route/bin"):  # within "route", where a fused kernel is counted too
            routing, remapped_T = bin_assignments(
                plain_routing, tokens, self._rule,
                seed=knobs.seed, total=self._sum_votes(), bonus_E=self._bonus(resident_E),
            )  # fmt: skip
        return routing, {"remapped": remapped_T}

    def _is_fused(self, tokens: int) -> bool:
        """Returns whether one kernel both routes and bins; it does not if a rank has more tokens than the
        kernel takes."""
        cfg, kernels = self.blueprint.cfg, self.blueprint.kernels
        if kernels.binning == "xla":
            return False
        refusal = binning.why_not(
            kernels.binning, kernels.platform, cfg.num_experts, self._rule, tokens=tokens
        )
        return refusal is None

    def route(
        self, logits_TE: Float[Array, "T E"], tokens: TokenFlags
    ) -> tuple[Routing, Routing, Changes] | None:
        if not self._is_fused(len(logits_TE)):
            return None
        plain, routing, remapped_T = route_binned(
            logits_TE,
            tokens,
            self._rule,
            renormalize=self.blueprint.cfg.router.norm_topk_prob,
            choice=binning.KernelChoice(self.blueprint.kernels.binning, self.blueprint.kernels.platform),
            total=self._sum_votes(),
        )
        return plain, routing, {"remapped": remapped_T}

    @property
    def _rule(self) -> binning.Rule:
        return get_rule(self.table, self.blueprint.cfg.num_experts_per_tok)

    def _sum_votes(self) -> Callable[[Array], Array] | None:
        """Returns a sum over the ranks that read the same experts' weights, or None if one rank has all
        experts."""
        return partial(lax.psum, axis_name=EXPERT) if self.blueprint.mesh.shape[EXPERT] > 1 else None

    def _bonus(self, resident_E: Array | None) -> Float[Array, " E"] | None:
        """Returns the bonus in nats that is added to each expert's logit, or None if no expert has one."""
        experts, bonus_E = self.blueprint.cfg.num_experts, None
        if self.table.resident_bonus and resident_E is not None:
            bonus_E = jnp.where(resident_E, jnp.float32(self.table.resident_bonus), 0.0)
        if not self.table.local_bonus:
            return bonus_E
        held = experts // self.blueprint.mesh.shape[EXPERT]
        own_E = jnp.arange(experts, dtype=jnp.int32) // held == lax.axis_index(EXPERT)
        local_E = jnp.where(own_E, jnp.float32(self.table.local_bonus), 0.0)
        return local_E if bonus_E is None else bonus_E + local_E


def get_rule(cfg: BinningConfig, k: int) -> binning.Rule:
    return binning.Rule(cfg.method, k, cfg.bin_width, cfg.k0, cfg.keep)


def get_needs(cfg: BinningConfig, model: ModelConfig) -> binning.BinningNeeds:
    """Returns what the choice of a kernel for binning depends on."""
    return binning.BinningNeeds(
        model.num_experts,
        get_rule(cfg, model.num_experts_per_tok),
        has_bonus=bool(cfg.local_bonus or cfg.resident_bonus),
        has_plain_router=model.router.is_plain,
    )


def prefer(routing: Routing, lossy_T: Array, bonus_E: Float[Array, " E"]) -> Routing:
    """Returns the routing with ``bonus_E`` nats added to the experts' logits; only lossy tokens are
    remapped."""
    liked_TE = routing.logits_TE + bonus_E[None]
    rows_T1 = jnp.arange(lossy_T.shape[0])[:, None]
    _, wanted_TK = lax.top_k(liked_TE, routing.ids_TK.shape[1])
    wanted_TE = jnp.zeros(liked_TE.shape, bool).at[rows_T1, wanted_TK].set(True)
    moved = binning.remap(routing.ids_TK, routing.weights_TK, liked_TE, routing.scores_TE, wanted_TE, lossy_T)
    return Routing(*moved, routing.scores_TE, liked_TE)


def bin_assignments(
    plain_routing: Routing,
    tokens: TokenFlags,
    rule: binning.Rule,
    *,
    seed: Int[Array | np.ndarray, ""],
    total: Callable[[Array], Array] | None = None,
    bonus_E: Float[Array, " E"] | None = None,
) -> tuple[Routing, Int[Array, " T"]]:
    """Returns any router's choice on the active set, and how many assignments of each token moved.

    seed: seed of the method "random"; the same on ranks that share weights.
    total: sums votes over those ranks.
    bonus_E: nats added to each expert's logit; None prefers no expert.
    """
    lossy_T = tokens.lossy_T
    routing = plain_routing if bonus_E is None else prefer(plain_routing, lossy_T, bonus_E)
    logits_TE = routing.logits_TE
    votes_VE = binning.cast_votes(routing.ids_TK, logits_TE, tokens.valid_T, lossy_T, rule)
    draw_E = None
    if rule.method == "random":
        draw_E = jax.random.uniform(jax.random.key(seed), logits_TE.shape[1:])
    active_E = binning.choose_active(votes_VE if total is None else total(votes_VE), rule, draw_E)
    moved = binning.remap(routing.ids_TK, routing.weights_TK, logits_TE, routing.scores_TE, active_E, lossy_T)
    result = Routing(*moved, _mask_inactive(plain_routing.scores_TE, active_E), plain_routing.logits_TE)
    return result, _count_remapped(plain_routing, result)


def route_binned(
    logits_TE: Float[Array, "T E"],
    tokens: TokenFlags,
    rule: binning.Rule,
    *,
    renormalize: bool,
    choice: binning.KernelChoice,
    total: Callable[[Array], Array] | None = None,
) -> tuple[Routing, Routing, Int[Array, " T"]]:
    """Returns a softmax router's own choice, its binned and sorted form, and the number of moved assignments
    of each token."""
    logits_TE = logits_TE.astype(jnp.float32)
    b = binning.bin_experts(
        logits_TE, tokens.valid_T, tokens.lossy_T, rule, choice, renormalize=renormalize, total=total
    )
    plain = Routing(b.plain_ids_TK, b.plain_weights_TK, b.scores_TE, logits_TE)
    plan = DispatchPlan(b.order_N, b.group_sizes_E)
    result = Routing(b.ids_TK, b.weights_TK, _mask_inactive(b.scores_TE, b.active_E), logits_TE, plan)
    return plain, result, _count_remapped(plain, result)


def _mask_inactive(scores_TE: Float[Array, "T E"], active_E: Bool[Array, " E"]) -> Float[Array, "T E"]:
    """Returns the scores, with 0 for experts outside the set."""
    return jnp.where(active_E[None], scores_TE, 0.0)


def _count_remapped(old: Routing, new: Routing) -> Int[Array, " T"]:
    return jnp.sum(old.ids_TK != new.ids_TK, axis=1, dtype=jnp.int32)
