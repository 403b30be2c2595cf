"""A step that runs on the device, and its results."""

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
    """A step that was started.

    placed: runs of the step.
    sampled: sampled tokens, on the device.
    changes_B: what lossy techniques did to each row; None if nothing lossy is configured for the phase.
    scores: log-probabilities of prompt tokens, if any are requested.
    began: ``time.monotonic`` when the host began to plan the step.
    planned: seconds that planning took.
    """

    placed: list[Placed]
    sampled: Sampled
    changes_B: Changes | None
    scores: StartedScores | None
    began: float
    planned: float

    @property
    def must_be_seen(self) -> bool:
        """Whether the host must see this step's tokens before the next step: some row has a grammar."""
        return any(run.draws and run.request.constraint is not None for run, *_ in self.placed)

    def fetch(self) -> list[np.ndarray]:
        """Waits for the end of the step; returns the sampled tokens, their scores, whether their logits are
        finite, and the number of lost assignments to experts."""
        s = self.sampled
        return jax.device_get([s.ids_B, s.logprob_B, s.top_ids_BA, s.top_logprobs_BA, s.finite_B, s.lost])

    def report(self, fetched: float, delivered: float) -> StepReport:
        """fetched, delivered: ``time.monotonic`` when the results were on the host and when they were
        delivered."""
        decoded = sum(placed.run.decodes for placed in self.placed)
        prompts = sum(placed.run.count for placed in self.placed if not placed.run.decodes)
        host = self.planned + delivered - fetched
        return StepReport(prompts, decoded, fetched - self.began, host)


def count_assignments(placed: Placed, changes: Changes | None, cfg: ModelConfig) -> None:
    """Adds a step's assignments, and the changes to them, to the request's counts.

    changes: the step's changes, on the host; None if there are none.
    """
    run, moe, rows = placed.run, placed.run.request.moe, placed.changed
    moe.assignments += run.count * len(cfg.moe_layers) * cfg.num_experts_per_tok
    if changes is not None:
        for name, changed_B in changes.items():
            vars(moe)[name] += int(changed_B[rows].sum())
