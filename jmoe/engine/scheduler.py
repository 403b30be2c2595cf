"""What the next step runs. Pure host code over plain objects.

First come, first served. A request enters when a decode slot and all the pages that it can ever need are
free on one rank, so a running request never has to stop. Prompts go before decoding: a step is either one
prefill run of at most one prompt a rank, or one token for every running request.

Which rank: the one with the most free pages. With ``share`` (request scheduling of Speculative MoE, arXiv
2503.04398) the one that holds most of the prompt's experts, of those that have room and were not given a
request yet in this round; a round ends when every rank was given one, so that none is left behind. Where only
ranks of this round have room, one of them takes the request at once: nobody waits for the round's sake.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jmoe.engine.pages import PagePool
from jmoe.engine.request import QueueFull, Request

# prompt token ids -> the part of their assignments that is expected on each rank
Share = Callable[[list[int]], Sequence[float]]


@dataclass(frozen=True)
class Step:
    """One call of the model. prefill: prompts' next runs of tokens; else one decode token each."""

    requests: list[Request]
    prefill: bool


class Scheduler:
    """slots_per_rank: requests that decode together on one rank. max_queue: waiting requests at most.

    share: what part of a prompt's expected assignments lies on each rank; None places requests without it.
    """

    def __init__(
        self,
        pool: PagePool,
        slots_per_rank: int,
        max_queue: int,
        max_model_len: int,
        share: Share | None = None,
    ):
        self.pool, self.slots, self.max_queue, self.max_model_len = (
            pool,
            slots_per_rank,
            max_queue,
            max_model_len,
        )
        self.share = share
        self.round: set[int] = set()  # ranks that were given a request
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def pages_needed(self, request: Request) -> int:
        """Pages for the prompt and everything it may generate (the last token's keys are never stored)."""
        room = self.max_model_len - len(request.prompt_token_ids)
        limit = request.params.max_tokens
        new = room if limit is None else min(limit, room)
        return self.pool.pages_for(len(request.prompt_token_ids) + max(new - 1, 0))

    def add(self, requests: list[Request]) -> None:
        """Queues all or none; QueueFull where they do not fit."""
        if len(self.waiting) + len(requests) > self.max_queue:
            raise QueueFull(
                f"the queue is full: {len(self.waiting)} of {self.max_queue} requests are waiting"
            )
        self.waiting.extend(requests)

    def next_step(self) -> Step | None:
        self._admit()
        prefill: dict[int, Request] = {}
        for request in self.running:
            if request.prefilled < len(request.prompt_token_ids):
                prefill.setdefault(request.rank, request)
        if prefill:
            return Step(list(prefill.values()), prefill=True)
        return Step(list(self.running), prefill=False) if self.running else None

    def finish(self, request: Request) -> None:
        """Frees a running request's slot and pages."""
        self.running.remove(request)
        self.pool.give_back(request.rank, request.pages)
        request.pages = []

    def drop(self, request_id: str) -> Request | None:
        """Takes a request out wherever it is; None where it is not here (any more)."""
        for request in self.running:
            if request.id == request_id:
                self.finish(request)
                return request
        for request in self.waiting:
            if request.id == request_id:
                self.waiting.remove(request)
                return request
        return None

    def _admit(self) -> None:
        while self.waiting:
            taken = [0] * len(self.pool.free)
            for request in self.running:
                taken[request.rank] += 1
            request = self.waiting[0]
            open_ranks = [r for r, count in enumerate(taken) if count < self.slots]
            if not open_ranks:
                return
            need = self.pages_needed(request)
            fitting = [r for r in open_ranks if len(self.pool.free[r]) >= need]
            if not fitting:
                return
            rank = max(fitting, key=lambda r: (len(self.pool.free[r]), -taken[r], -r))
            if self.share is not None:
                rank = self._likeliest(self.share(request.prompt_token_ids), fitting)
            seated = {r.seat for r in self.running}
            request.seat = next(seat for seat in range(len(seated) + 1) if seat not in seated)
            request.rank, request.pages = rank, self.pool.take(rank, need)
            self.running.append(self.waiting.popleft())

    def _likeliest(self, share: Sequence[float], fitting: list[int]) -> int:
        """The rank for a request with these expected shares, noted in this round."""
        fresh = [r for r in fitting if r not in self.round] or fitting
        rank = max(fresh, key=lambda r: (share[r], len(self.pool.free[r]), -r))
        self.round.add(rank)
        if len(self.round) == len(self.pool.free):
            self.round.clear()
        return rank
