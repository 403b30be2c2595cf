"""A step that the device works on, and what comes back of it."""

from dataclasses import dataclass

import jax
import numpy as np

from jmoe.config.model import ModelConfig
from jmoe.engine.request import StepReport
from jmoe.engine.step.fill import Placed
from jmoe.engine.step.sampling import Sampled
from jmoe.engine.step.scores import StartedScores
from jmoe.moe.types import Changes


@dataclass(frozen=True)
class Started:
    """began, planned: ``time.monotonic`` when the host began to plan the step, and the seconds that took.
    scores: of prompt tokens, where any are asked for."""

    placed: list[Placed]
    sampled: Sampled
    changes: Changes | None
    scores: StartedScores | None
    began: float
    planned: float

    @property
    def must_be_seen(self) -> bool:
        """Whether the next step depends on what this one draws."""
        return any(run.draws and run.request.constraint is not None for run, *_ in self.placed)

    def fetch(self) -> list[np.ndarray]:
        """Drawn tokens, their scores, whether they are sane, and how many assignments to experts were lost;
        waits for the step's end."""
        s = self.sampled
        return jax.device_get([s.ids_B, s.logprob_B, s.top_ids_BA, s.top_logprobs_BA, s.finite_B, s.lost])

    def report(self, fetched: float, delivered: float) -> StepReport:
        """fetched, delivered: ``time.monotonic`` when its results were on the host and told."""
        decoded = sum(placed.run.decodes for placed in self.placed)
        prompts = sum(placed.run.count for placed in self.placed if not placed.run.decodes)
        host = self.planned + delivered - fetched
        return StepReport(prompts, decoded, fetched - self.began, host)


def count_assignments(placed: Placed, changes: Changes | None, cfg: ModelConfig) -> None:
    """What a step did to a request's assignments. changes: on the host, None where it changed nothing."""
    run, moe, rows = placed.run, placed.run.request.moe, placed.changed
    moe.assignments += run.count * len(cfg.moe_layers) * cfg.num_experts_per_tok
    if changes is not None:
        for name, changed_B in changes.items():
            vars(moe)[name] += int(changed_B[rows].sum())
