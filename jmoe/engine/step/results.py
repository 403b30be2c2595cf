"""A step that runs on the device, and its results: sampled tokens, counts, log-probabilities.

The log-probabilities of a prompt are collected over its runs and sent with the answer.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from jmoe.config.model import ModelConfig
from jmoe.engine.reports import StepReport
from jmoe.engine.request import Request, TokenLogprob
from jmoe.engine.schedule.plan import Run
from jmoe.engine.step.fill import PlacedRun
from jmoe.engine.step.runner import Runner
from jmoe.engine.step.sampling import Sampled
from jmoe.moe.types import Changes

# scores of every token of the grid, still being computed: see ``Runner.score``
DeviceScores = tuple[Array, ...]


class FetchedStep(NamedTuple):
    """The results of a step on the host, one entry per sampled token.

    ids_B: sampled tokens.
    logprob_B: their log-probabilities.
    top_ids_BA: likeliest tokens.
    top_logprobs_BA: log-probabilities of the likeliest tokens.
    finite_B: whether the logits are finite.
    num_lost: assignments that no expert computed; unless 0, the tokens are wrong.
    """

    ids_B: np.ndarray
    logprob_B: np.ndarray
    top_ids_BA: np.ndarray
    top_logprobs_BA: np.ndarray
    finite_B: np.ndarray
    num_lost: int

    def scores(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the log-probability of the row's token, the likeliest tokens and their
        log-probabilities."""
        return self.logprob_B[row], self.top_ids_BA[row], self.top_logprobs_BA[row]


@dataclass(frozen=True)
class RunningStep:
    """A step that was started and is not delivered yet.

    placed: runs of the step.
    sampled: sampled tokens, on the device.
    changes_B: what lossy techniques did to each row; None if nothing lossy is configured for the phase.
    prompt_scores: log-probabilities of prompt tokens, if any are requested.
    start_time: ``time.monotonic`` when the host began to plan the step.
    planning_seconds: seconds that planning took.
    """

    placed: list[PlacedRun]
    sampled: Sampled
    changes_B: Changes | None
    prompt_scores: DeviceScores | None
    start_time: float
    planning_seconds: float

    @property
    def blocks_next_step(self) -> bool:
        """Whether the host must see this step's tokens before the next step: the mask of some row depends on
        them."""
        return any(_is_awaited(run) for run, *_ in self.placed)

    def fetch(self) -> FetchedStep:
        """Waits for the end of the step and brings its results to the host."""
        s = self.sampled
        arrays = s.ids_B, s.logprob_B, s.top_ids_BA, s.top_logprobs_BA, s.finite_B, s.num_lost
        ids_B, logprob_B, top_ids_BA, top_logprobs_BA, finite_B, num_lost = jax.device_get(arrays)
        return FetchedStep(ids_B, logprob_B, top_ids_BA, top_logprobs_BA, finite_B, int(num_lost))

    def report(self, fetch_time: float, delivery_time: float) -> StepReport:
        """Returns the report of the step.

        fetch_time: ``time.monotonic`` when the results were on the host.
        delivery_time: ``time.monotonic`` when they were delivered.
        """
        decoded = sum(placed.run.is_decode for placed in self.placed)
        prompts = sum(placed.run.count for placed in self.placed if not placed.run.is_decode)
        host = self.planning_seconds + delivery_time - fetch_time
        return StepReport(prompts, decoded, fetch_time - self.start_time, host)


def _is_awaited(run: Run) -> bool:
    """Returns whether the run's token must be on the host before its request draws the next one."""
    state = run.request.state
    return run.is_sampled and run.request.needs_mask and not state.num_stale and not state.is_ended


def count_assignments(placed: PlacedRun, changes: Changes | None, cfg: ModelConfig) -> None:
    """Adds a step's assignments, and the changes to them, to the request's counts.

    changes: changes of the step, on the host; None if the step has none.
    """
    run, moe, rows = placed.run, placed.run.request.moe, placed.change_rows
    moe.assignments += run.count * len(cfg.moe_layers) * cfg.num_experts_per_tok
    if changes is not None:
        for name, changed_B in changes.items():
            vars(moe)[name] += int(changed_B[rows].sum())


class PromptScores:
    """The scores of the prompts whose answers have not begun."""

    def __init__(self, runner: Runner):
        self.runner = runner
        self._scores: dict[str, list[TokenLogprob | None]] = {}

    def want(self, request: Request) -> None:
        if request.params.prompt_logprobs is not None:
            self._scores[request.id] = [None]  # nothing predicts the first token

    def start(self, placed: list[PlacedRun], hidden_RND: Array) -> DeviceScores | None:
        """Starts to score the prompt tokens that a step's positions predict; returns None if nobody wants
        them."""
        scored = [p for p in placed if not p.run.is_decode and p.run.request.id in self._scores]
        if not scored:
            return None
        targets_RN = np.zeros(hidden_RND.shape[:2], np.int32)
        for each in scored:
            following = _following(each)
            targets_RN[each.rank, each.column : each.column + len(following)] = following
        return self.runner.score(hidden_RND, targets_RN)

    def keep(self, placed: PlacedRun, scores: tuple[np.ndarray, ...] | None) -> None:
        """Keeps the scores of a run's prompt tokens.

        scores: result of ``start``, on the host.
        """
        request = placed.run.request
        kept = self._scores.get(request.id)
        if scores is None or kept is None or placed.run.is_decode:
            return
        if placed.run.start == 0:  # the request may have been preempted
            del kept[1:]
        alternatives = request.params.prompt_logprobs or 0
        kept.extend(
            token_logprob(token, tuple(s[placed.rank, placed.column + i] for s in scores), alternatives)
            for i, token in enumerate(_following(placed))
        )

    def take(self, request: Request) -> tuple[TokenLogprob | None, ...] | None:
        """Removes and returns a request's scores, one entry per prompt token, or returns None if none are
        kept."""
        kept = self._scores.pop(request.id, None)
        return None if kept is None else tuple(kept)


def _following(placed: PlacedRun) -> list[int]:
    """Returns the prompt token after each token of the run."""
    run = placed.run
    return run.request.prompt_token_ids[run.start + 1 : run.start + run.count + 1]


def token_logprob(token: int, scores: tuple, alternatives: int) -> TokenLogprob:
    """Returns the token's log-probability and the ``alternatives`` likeliest tokens; the token is always
    listed.

    scores: log-probability of the token, the likeliest tokens, their log-probabilities, and perhaps the
        token's rank.
    """
    logprob, top_ids, top, *rank = scores
    pairs = [(int(i), float(p)) for i, p in zip(top_ids[:alternatives], top[:alternatives], strict=True)]
    if token not in (i for i, _ in pairs):
        pairs.append((token, float(logprob)))
    own = next(p for i, p in pairs if i == token)
    return TokenLogprob(token, own, tuple(pairs), int(rank[0]) if rank else None)
