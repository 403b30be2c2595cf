"""Decides which experts a layer's tokens go to: route -> bin -> limit, that is, the router and then the lossy
stages in order.

A stage is made from its config table and the model's blueprint, see ``jmoe.moe.stage``.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
from jax import Array

from jmoe.blueprint import Blueprint
from jmoe.config.techniques import BinningConfig, CapacityConfig, LossyConfig, Phase
from jmoe.mesh import EXPERT
from jmoe.moe.binning import Binning
from jmoe.moe.capacity import Capacity
from jmoe.moe.counting import add_changes, count_changes
from jmoe.moe.routing import RouterWeights, choose_experts, router_logits
from jmoe.moe.stage import Stage
from jmoe.moe.types import Changes, Knobs, Routing, TokenFlags

STAGES: dict[type[LossyConfig], type[Stage]] = {BinningConfig: Binning, CapacityConfig: Capacity}


def check_stages(blueprint: Blueprint) -> None:
    """Raises ValueError for a lossy technique that has no meaning for the model or on its mesh."""
    cfg, moe, mesh = blueprint.cfg, blueprint.moe, blueprint.mesh
    for table in moe.stages:
        if moe.train_capacity_factor is not None:
            raise ValueError(f"moe.{table.name} and moe.train_capacity_factor exclude each other")
        table.check_layer(cfg.num_experts, cfg.num_experts_per_tok, mesh.shape[EXPERT])


class Decision(NamedTuple):
    """The routing of one layer, before and after the lossy stages.

    plain_routing: own choice of the router.
    final_routing: routing that is computed; the same object as ``plain_routing`` if nothing lossy is on.
    changes: what the stages changed for each token; None if no stage acts.
    """

    plain_routing: Routing
    final_routing: Routing
    changes: Changes | None


@dataclass(frozen=True)
class Decider:
    """Runs the router, then the configured lossy stages in their order."""

    blueprint: Blueprint

    def __call__(
        self,
        x_TD: Array,
        tokens: TokenFlags,
        phase: Phase,
        knobs: Knobs | None,
        router: RouterWeights,
        resident_E: Array | None,
    ) -> Decision:
        """Decides where tokens go.

        resident_E: which experts are on a device; None if all are.
        """
        stages = () if knobs is None else self._stages(phase)
        with jax.named_scope("route"):
            logits_TE = router_logits(x_TD, router, self.blueprint.kernels.dense)
            fused = stages[0].route(logits_TE, tokens) if stages else None
            if fused is None:
                plain = final = choose_experts(logits_TE, router, self.blueprint.cfg)
                changes = {}
            else:
                plain, final, changes = fused
                stages = stages[1:]  # the kernel has already run this stage
        for stage in stages:
            assert knobs is not None, "no stage acts without knobs"
            final, changed = stage(final, tokens, knobs, resident_E)
            changes = add_changes(changes, changed)
        return Decision(plain, final, count_changes(changes))

    def _stages(self, phase: Phase) -> list[Stage]:
        """Returns the stages that act in the phase."""
        stages: list[Stage] = [
            STAGES[type(table)](table, self.blueprint) for table in self.blueprint.moe.stages
        ]
        return [stage for stage in stages if stage.acts_in(phase)]
