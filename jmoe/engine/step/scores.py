"""Log-probabilities of sampled tokens and of prompts. A prompt's are collected over its runs and sent with
the answer."""

import numpy as np
from jax import Array

from jmoe.engine.request import Request, TokenLogprob
from jmoe.engine.step.fill import Placed
from jmoe.engine.step.runner import Runner

StartedScores = tuple[Array, Array, Array]
"""Scores of every token of the grid, still being computed: see ``sampling.score``."""


class PromptScores:
    """The scores of the prompts whose answers have not begun."""

    def __init__(self, runner: Runner):
        self.runner = runner
        self._kept: dict[str, list[TokenLogprob | None]] = {}

    def want(self, request: Request) -> None:
        if request.params.prompt_logprobs is not None:
            self._kept[request.id] = [None]  # nothing predicts the first token

    def start(self, placed: list[Placed], hidden_RND: Array) -> StartedScores | None:
        """Starts to score the prompt tokens that a step's positions predict; None if nobody wants them."""
        asked = [p for p in placed if not p.run.decodes and p.run.request.id in self._kept]
        if not asked:
            return None
        targets_RN = np.zeros(hidden_RND.shape[:2], np.int32)
        for each in asked:
            following = _following(each)
            targets_RN[each.rank, each.column : each.column + len(following)] = following
        return self.runner.score(hidden_RND, targets_RN)

    def keep(self, placed: Placed, scored: tuple[np.ndarray, ...] | None) -> None:
        """Keeps the scores of a run's prompt tokens. scored: result of ``start``, on the host."""
        request = placed.run.request
        kept = self._kept.get(request.id)
        if scored is None or kept is None or placed.run.decodes:
            return
        if placed.run.start == 0:  # the request may have been preempted
            del kept[1:]
        asked = request.params.prompt_logprobs or 0
        kept.extend(
            token_logprob(token, tuple(s[placed.rank, placed.column + i] for s in scored), asked)
            for i, token in enumerate(_following(placed))
        )

    def take(self, request: Request) -> tuple[TokenLogprob | None, ...] | None:
        """Removes and returns a request's scores, one entry per prompt token; None if none are kept."""
        kept = self._kept.pop(request.id, None)
        return None if kept is None else tuple(kept)


def _following(placed: Placed) -> list[int]:
    """The prompt token after each token of the run."""
    run = placed.run
    return run.request.prompt_token_ids[run.start + 1 : run.start + run.count + 1]


def token_logprob(token: int, scores: tuple, alternatives: int) -> TokenLogprob:
    """The token's log-probability and the ``alternatives`` likeliest tokens; the token is always listed."""
    logprob, top_ids, top = scores
    pairs = [(int(i), float(p)) for i, p in zip(top_ids[:alternatives], top[:alternatives], strict=True)]
    if token not in (i for i, _ in pairs):
        pairs.append((token, float(logprob)))
    return TokenLogprob(token, next(p for i, p in pairs if i == token), tuple(pairs))
