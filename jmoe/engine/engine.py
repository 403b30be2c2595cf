"""The engine: a step is plan -> start -> deliver what the step before it gave.

The device works on a step while the host delivers the one before and plans the one behind: the token that a
request was just given need not be on the host for its next step, only for what depends on it (the end of the
answer, a grammar). A request that turns out to have ended leaves a row in the step behind, which is ignored.
Synchronous; ``worker`` gives it a thread of its own.
"""

import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Protocol

import jax
import numpy as np

from jmoe.engine.placing import constrain, fill, place
from jmoe.engine.plan import Step
from jmoe.engine.request import (
    EngineDead,
    EngineSnapshot,
    FinishReason,
    Output,
    Request,
    SamplingParams,
    StepReport,
)
from jmoe.engine.runner import Runner
from jmoe.engine.sampling import ENDS
from jmoe.engine.scheduler import Scheduler
from jmoe.engine.scores import PromptScores, token_logprob
from jmoe.engine.started import Started
from jmoe.engine.text import Detokenizer, TextCodec
from jmoe.moe.placement import Placement


class Listener(Protocol):
    """Told of every token, end and step, from the engine's thread (metrics)."""

    def token(self, request: Request, now: float) -> None: ...
    def stepped(self, report: StepReport) -> None: ...
    def finished(self, request: Request, reason: str) -> None: ...


class Engine:
    """Continuous batching over a warmed-up runner. ``codec`` None: token ids only, texts stay empty.
    ``placement``: what the runner's experts were renumbered by."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        codec: TextCodec | None,
        end_ids: Iterable[int],
        placement: Placement | None = None,
    ):
        self.runner, self.scheduler, self.codec = runner, scheduler, codec
        self.end_ids, self.placement = frozenset(end_ids), placement
        self.max_model_len, self.vocab_size = scheduler.limits.longest, runner.cfg.vocab_size
        self.listeners: list[Listener] = []
        self._texts: dict[str, Detokenizer] = {}
        self._scores = PromptScores(runner)
        self._started: Started | None = None  # and not delivered
        self._closed = False

    def close(self) -> None:
        """Frees the weights and the cache and takes no more requests; safe to call again."""
        self._closed = True
        self.runner.close()

    def check_open(self) -> None:
        """Raises EngineDead after ``close``."""
        if self._closed:
            raise EngineDead("the engine is closed")

    # ---- requests in -------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Raises ValueError with one line where the request can never be served; EngineDead once closed."""
        self.check_open()
        prompt, params = request.prompt_token_ids, request.params
        if not prompt:
            raise ValueError("the prompt is empty; it needs at least one token")
        bad = next((t for t in prompt if not 0 <= t < self.vocab_size), None)
        if bad is not None:
            raise ValueError(f"token id {bad} is outside the vocabulary of {self.vocab_size}")
        asked = params.max_tokens or 0
        if len(prompt) + asked > self.max_model_len or (
            len(prompt) == self.max_model_len and params.max_tokens != 0
        ):
            raise ValueError(
                f"This model's maximum context length is {self.max_model_len} tokens. However, you requested "
                f"{len(prompt) + asked} tokens ({len(prompt)} in the prompt, {asked} to generate)."
            )
        need, have = self.scheduler.pages_needed(request), self.scheduler.pool.pages_per_rank
        if need > have:
            raise ValueError(
                f"the request needs {need} KV pages and there are {have}: shorten it or raise --kv-memory"
            )
        if params.min_tokens and len(self._ends(params)) > ENDS:
            raise ValueError(f"min_tokens with more than {ENDS} end tokens is not supported")
        outside = next((t for t, _ in params.logit_bias if not 0 <= t < self.vocab_size), None)
        if outside is not None:
            raise ValueError(f"logit_bias: token id {outside} is outside the vocabulary of {self.vocab_size}")
        if self.codec is None and params.stop:
            raise ValueError("stop strings need a tokenizer, which this model directory does not have")

    def add(self, requests: list[Request]) -> None:
        """Queues all or none. Raises ValueError for a bad one, QueueFull where there is no room."""
        most = self.scheduler.limits.queue
        if len(requests) > most:
            raise ValueError(f"{len(requests)} requests at once exceed the queue of {most}")
        for request in requests:
            self.check(request)
        self.scheduler.add(requests)
        for request in requests:
            if self.codec is not None:
                self._texts[request.id] = Detokenizer(self.codec, request.params.stop)
            self._scores.want(request)

    def abort(self, request_id: str) -> None:
        """Ends a request wherever it is; unknown ids are finished ones and change nothing."""
        request = self.scheduler.drop(request_id)
        if request is not None:
            self._ended(request, Output(request_id, finish_reason="abort"))

    def run(self, requests: list[Request]) -> None:
        """Serves ``requests`` to their ends, feeding the queue as it has room."""
        for request in requests:
            self.check(request)
        left, scheduler = requests[::-1], self.scheduler
        while left or self.busy:
            while left and len(scheduler.waiting) < scheduler.limits.queue:
                self.add([left.pop()])
            self.step()

    # ---- one step ----------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether anything runs, waits or is to be delivered."""
        return bool(self._started or self.scheduler.running or self.scheduler.waiting)

    def step(self) -> bool:
        """Starts a step and delivers the one before; False where there was neither."""
        if self._started is not None and self._started.must_be_seen:
            self._deliver()
        began = time.monotonic()
        step = self.scheduler.next_step()
        started = None if step is None else self._start(step, began)
        if started is None and self._started is None:
            return False
        if self._started is not None:
            self._deliver()
        self._started = started
        return True

    def _start(self, step: Step, began: float) -> Started:
        runner = self.runner
        for copies in step.copy_rounds():
            from_R, to_R = np.zeros((2, runner.ranks), np.int32)
            for rank, source, target in copies:
                from_R[rank], to_R[rank] = source, target
            runner.copy_pages(from_R, to_R)
        placed, given = place(step, runner)
        for each in placed:
            request = each.run.request
            request.started = request.started or began
            fill(each, given, self._ends(request.params))
            if (failure := constrain(each, given)) is not None:
                self._fail(request, failure)
        planned = time.monotonic() - began
        sampled, hidden, changes = runner.run(given)
        scores = self._scores.start(placed, hidden)
        return Started(placed, sampled, changes if runner.lossy else None, scores, began, planned)

    def _ends(self, params: SamplingParams) -> list[int]:
        ends = () if params.ignore_eos else self.end_ids
        return sorted({*ends, *params.stop_token_ids})

    # ---- results out -------------------------------------------------------------------------------

    def _deliver(self) -> None:
        """Appends each row's token to its request and emits what became certain, once the step has ended."""
        started, self._started = self._started, None
        assert started is not None
        ids, *scores, finite = started.fetch()
        now = time.monotonic()
        self._scores.keep(started.placed, started.scores)
        self._count_assignments(started)
        for run, row, *_ in started.placed:
            request = run.request
            request.place.drawn -= run.draws
            if request.place.ended or not run.draws:
                continue
            if not finite[row]:
                self.scheduler.spoil(request)
                self._fail(request, "the model produced NaN logits")
            elif request.params.max_tokens == 0:
                self._end(request, self._output(request, (), finish_reason="length"))
            else:
                self._deliver_token(request, int(ids[row]), tuple(s[row] for s in scores), now)
        report = started.report(now, time.monotonic())
        for listener in self.listeners:
            listener.stepped(report)

    def _count_assignments(self, started: Started) -> None:
        """What the step did to each request's assignments, where it may have done something to them."""
        if not self.runner.lossy:
            return
        cfg = self.runner.cfg
        counts = None if started.changes is None else jax.device_get(started.changes)
        for placed in started.placed:
            run, rows = placed.run, placed.changed
            moe = run.request.moe
            moe.assignments += run.count * len(cfg.moe_layers) * cfg.num_experts_per_tok
            if counts is not None:
                moe.remapped += int(counts.remapped_T[rows].sum())
                moe.dropped += int(counts.dropped_T[rows].sum())
                moe.rerouted += int(counts.rerouted_T[rows].sum())

    def _deliver_token(self, request: Request, token: int, scores: tuple, now: float) -> None:
        request.token_ids.append(token)
        if request.place.rank >= 0:
            self.scheduler.tell(request)
        request.first_token = request.first_token or now
        for listener in self.listeners:
            listener.token(request, now)
        params, text, finish, stopped_by = request.params, "", None, None
        detokenizer = self._texts.get(request.id)
        if token in params.stop_token_ids:
            finish, stopped_by = "stop", token
        elif token in self.end_ids and not params.ignore_eos:
            finish = "stop"
        elif detokenizer is not None:
            text = detokenizer.push(token, may_stop=len(request.token_ids) >= params.min_tokens)
            if detokenizer.stopped_by is not None:
                finish, stopped_by = "stop", detokenizer.stopped_by
        if finish is None and (
            len(request.token_ids) == params.max_tokens or request.length == self.max_model_len
        ):
            finish = "length"
        if finish is not None and detokenizer is not None and detokenizer.stopped_by is None:
            text += detokenizer.flush()
        logprobs = ()
        if params.logprobs is not None:
            logprobs = (token_logprob(token, scores, params.logprobs),)
        if request.constraint is not None and finish is None:
            try:
                request.constraint.accept(token)
            except ValueError as error:
                self._fail(request, str(error))
                return
        output = self._output(
            request, (token,), text=text, logprobs=logprobs, finish_reason=finish, stop_reason=stopped_by
        )
        if finish is None:
            request.emit(output)
        else:
            self._end(request, output)

    def _output(self, request: Request, token_ids: tuple[int, ...], **fields: Any) -> Output:
        return Output(request.id, token_ids, prompt_logprobs=self._scores.take(request), **fields)

    def _fail(self, request: Request, cause: str) -> None:
        self._end(request, Output(request.id, finish_reason="error", error=cause))

    def _end(self, request: Request, output: Output) -> None:
        self.scheduler.finish(request)
        self._ended(request, output)

    def _ended(self, request: Request, output: Output) -> None:
        self._texts.pop(request.id, None)
        self._scores.take(request)
        reason: FinishReason = output.finish_reason or "error"
        if self.runner.lossy:
            output = replace(output, moe=request.moe)
        for listener in self.listeners:
            listener.finished(request, reason)
        request.emit(output)

    def give_up(self, reason: FinishReason, cause: str) -> None:
        """Ends every request, once no step can run any more."""
        self._started = None
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            self.scheduler.drop(request.id)
            self._ended(request, Output(request.id, finish_reason=reason, error=cause))

    # ---- looking in --------------------------------------------------------------------------------

    def snapshot(self) -> EngineSnapshot:
        s = self.scheduler
        after = self.runner.compilations.after_warm_up
        told = s.preemptions, s.prefix.queries, s.prefix.hits
        return EngineSnapshot(len(s.running), len(s.waiting), s.pool.usage, self.runner.alive, after, *told)

    def moe_stats(self) -> dict[str, Any]:
        """What the experts did since the start, by phase: totals, means a step, counts layer x expert (as the
        checkpoint numbers them)."""
        self.runner.drain()
        cfg = self.runner.cfg
        phases = {
            phase: counters.report() | {"counts": self._by_expert(counters.counts_LE).tolist()}
            for phase, counters in self.runner.counters.items()
        }
        shape = {
            "layers": cfg.num_hidden_layers,
            "moe_layers": list(cfg.moe_layers),
            "experts": cfg.num_experts,
            "top_k": cfg.num_experts_per_tok,
        }
        ranks = {} if self.placement is None else {"placement": self._rank_of_expert().tolist()}
        return {"model": shape, "mesh": dict(self.runner.mesh.shape), **ranks, **phases}

    def _rank_of_expert(self) -> np.ndarray:
        """int ``[L, E]``: where each expert, as the checkpoint numbers it, is computed."""
        assert self.placement is not None
        experts_LP, ranks = self.placement.experts_LP, self.placement.ranks
        places = np.broadcast_to(
            np.arange(experts_LP.shape[1]) * ranks // experts_LP.shape[1], experts_LP.shape
        )
        rank_LE = np.zeros((len(experts_LP), self.runner.cfg.num_experts), np.int64)
        np.put_along_axis(rank_LE, experts_LP.astype(np.int64), places, axis=1)
        return rank_LE

    def _by_expert(self, counts_LP: np.ndarray) -> np.ndarray:
        return counts_LP if self.placement is None else self.placement.by_expert(counts_LP)
