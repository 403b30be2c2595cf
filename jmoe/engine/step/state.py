"""The state that a step takes from the step before, and the step's other results."""

from dataclasses import dataclass, replace

import jax
from jax import Array
from jaxtyping import Float, Int
from jmoe_kernels.paged_attention import LayerPages

from jmoe.config.techniques import Phase
from jmoe.engine.step.counters import MoETotals
from jmoe.engine.step.sampling import Sampled
from jmoe.moe.types import Changes
from jmoe.offload.cache import ExpertCache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DeviceState:
    """The state that stays on the device between steps. A step takes its memory: the old state is then dead.

    pages: KV pages of each layer.
    totals: counts by phase; a step takes and returns those of its own phase alone.
    latest_S: token sampled last for each seat.
    counts_SV: counts of each seat's tokens, see ``penalties``.
    cache: cache of the offloaded experts; None if none are offloaded.
    """

    pages: list[LayerPages]
    totals: dict[Phase, MoETotals]
    latest_S: Int[Array, " S"]
    counts_SV: Int[Array, "S V"]
    cache: ExpertCache | None = None

    def for_phase(self, phase: Phase) -> "DeviceState":
        """Returns the part that a step of the phase takes."""
        return replace(self, totals={phase: self.totals[phase]})

    def with_phase(self, part: "DeviceState") -> "DeviceState":
        """Returns the state after a step that returned ``part``."""
        return replace(part, totals=self.totals | part.totals)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepOutput:
    """The results of one step, on the device.

    sampled: sampled tokens.
    hidden_RND: final hidden states in the grid of ``Sequences``; prompts are scored from them.
    changes_B: what lossy techniques did to each row; None if nothing lossy is configured for the phase.
    """

    sampled: Sampled
    hidden_RND: Float[Array, "R n D"]
    changes_B: Changes | None
