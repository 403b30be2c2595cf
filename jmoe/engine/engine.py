"""The engine: a step is plan -> start -> deliver the results of the previous step.

The device works on a step while the host delivers the previous one and plans the next one. This is possible
because a request's next step does not need its newest token on the host; only the end of the answer and a
grammar's mask do. If a request turns out to have ended, its row in the step that already runs is ignored.

A grammar needs no mask where the answer may be free text. A token drawn there that the grammar refuses is
thrown away, together with the token drawn after it, and is drawn again with a mask: from the same position
with the same noise, so that the answer is the same as with a mask at every step. The engine is synchronous;
``worker`` runs it on a separate thread.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np

from jmoe.engine.faults import ends_program, tell
from jmoe.engine.reports import EngineSnapshot, Listener
from jmoe.engine.request import EngineDead, FinishReason, Output, Request, SamplingParams
from jmoe.engine.schedule.plan import Run, Step
from jmoe.engine.schedule.scheduler import Scheduler
from jmoe.engine.step.answers import Answers, accept, detokenizers
from jmoe.engine.step.fill import PlacedRun, constrain, fill, place_runs
from jmoe.engine.step.inputs import StepInput
from jmoe.engine.step.penalties import new_counts
from jmoe.engine.step.results import FetchedStep, PromptScores, RunningStep, count_assignments
from jmoe.engine.step.runner import Runner
from jmoe.engine.step.sampling import ENDS
from jmoe.engine.step.token_limits import token_limits
from jmoe.engine.text.codec import TextCodec
from jmoe.placement.placement import Placement

log = logging.getLogger(__name__)
LIMITS = 64  # sets of limits on tokens that are kept


class Engine:
    """Continuous batching over a warmed-up runner.

    runner: object that runs the steps on the devices.
    scheduler: object that plans the steps.
    codec: tokenizer; with None there are only token ids, and texts stay empty.
    end_ids: end tokens of the model.
    placement: placement by which the runner's experts were renumbered; None = they were not.
    """

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
        self.max_model_len, self.vocab_size = scheduler.limits.max_model_len, runner.cfg.vocab_size
        self.listeners: list[Listener] = []
        self._answers = Answers(PromptScores(runner), self.end_ids, self.max_model_len)
        # the answers to one prompt have the same limits
        self._limits = lru_cache(LIMITS)(partial(token_limits, codec=codec, vocab_size=self.vocab_size))
        self._running_step: RunningStep | None = None  # the step that is started and not delivered yet
        self._is_closed = False

    def close(self) -> None:
        """Frees the weights and the cache and takes no more requests. It may be called again."""
        self._is_closed = True
        self.runner.close()

    def check_open(self) -> None:
        """Raises EngineDead after ``close``."""
        if self._is_closed:
            raise EngineDead("the engine is closed")

    # ---- requests in -------------------------------------------------------------------------------

    def check(self, requests: Sequence[Request]) -> None:
        """Raises a one-line ValueError if a request can never be served, and EngineDead after ``close``. Any
        thread may call it."""
        self.check_open()
        if len(requests) > (most := self.scheduler.limits.max_queue):
            raise ValueError(f"{len(requests)} requests at once exceed the queue of {most}")
        for request in requests:
            self._check(request)
        for prompt in {id(r.prompt_token_ids): r.prompt_token_ids for r in requests}.values():
            if min(prompt) < 0 or max(prompt) >= self.vocab_size:
                bad = next(t for t in prompt if not 0 <= t < self.vocab_size)
                raise ValueError(f"token id {bad} is outside the vocabulary of {self.vocab_size}")

    def _check(self, request: Request) -> None:
        """Checks all but the prompt's token ids, which the answers to one prompt share."""
        prompt, params = request.prompt_token_ids, request.params
        if not prompt:
            raise ValueError("the prompt is empty; it needs at least one token")
        max_tokens = 1 if params.max_tokens is None else params.max_tokens
        if len(prompt) + max_tokens > self.max_model_len:
            raise ValueError(
                f"This model's maximum context length is {self.max_model_len} tokens. However, you requested "
                f"{len(prompt) + max_tokens} tokens ({len(prompt)} in the prompt, {max_tokens} to generate)."
            )
        need, have = self.scheduler.pages_needed(request), self.scheduler.pool.pages_per_rank
        if need > have:
            raise ValueError(
                f"the request needs {need} KV pages and there are {have}: shorten it or raise --kv-memory"
            )
        if params.min_tokens and len(self._end_tokens(params)) > ENDS:
            raise ValueError(f"min_tokens with more than {ENDS} end tokens is not supported")
        outside = next((t for t, _ in params.logit_bias if not 0 <= t < self.vocab_size), None)
        if outside is not None:
            raise ValueError(f"logit_bias: token id {outside} is outside the vocabulary of {self.vocab_size}")
        self._limits(params.allowed_token_ids, params.bad_words)
        if self.codec is None and params.stop:
            raise ValueError("stop strings need a tokenizer, which this model directory does not have")

    def add(self, requests: Sequence[Request]) -> None:
        """Queues all or none of the requests; raises ValueError for a bad one, and QueueFull if there is no
        room."""
        self.check(requests)
        self.enqueue(requests)

    def enqueue(self, requests: Sequence[Request]) -> None:
        """Queues all or none of the requests, which ``check`` has accepted; raises QueueFull if there is no
        room."""
        texts = detokenizers(requests, self.codec)
        for request in requests:
            request.limits = self._limits(request.params.allowed_token_ids, request.params.bad_words)
        self.scheduler.add(list(requests))
        self._answers.begin(requests, texts)

    def abort(self, request_id: str) -> None:
        """Ends a request, waiting or running. An unknown id is that of a finished one and changes nothing."""
        request = self.scheduler.abort(request_id)
        if request is not None:
            self._report_end(request, Output(request_id, finish_reason="abort"))

    def run(self, requests: list[Request]) -> None:
        """Serves ``requests`` to their ends, feeding the queue as it has room."""
        for request in requests:
            self.check([request])
        remaining, scheduler = requests[::-1], self.scheduler
        while remaining or self.busy:
            while remaining and len(scheduler.waiting) < scheduler.limits.max_queue:
                self.enqueue([remaining.pop()])
            self.step()

    # ---- one step ----------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether any request runs or waits, or a step is to be delivered."""
        return bool(self._running_step or self.scheduler.running or self.scheduler.waiting)

    def step(self) -> bool:
        """Starts a step and delivers the previous one; returns False if there was neither."""
        if self._running_step is not None and self._running_step.blocks_next_step:
            self._deliver()
        start_time = time.monotonic()
        step = self.scheduler.next_step()
        running_step = None if step is None else self._start(step, start_time)
        if running_step is None and self._running_step is None:
            return False
        if self._running_step is not None:
            self._deliver()
        self._running_step = running_step
        return True

    def _start(self, step: Step, start_time: float) -> RunningStep:
        runner = self.runner
        for copies in step.copy_rounds():
            from_R, to_R = np.zeros((2, runner.ranks), np.int32)
            for rank, source, target in copies:
                from_R[rank], to_R[rank] = source, target
            runner.copy_pages(from_R, to_R)
        placed, inputs = place_runs(step, runner)
        for each in placed:
            each.run.request.start_time = each.run.request.start_time or start_time
            self._isolate(each.run.request, self._fill, each, inputs)
        planning_seconds = time.monotonic() - start_time
        output = runner.run(inputs)
        scores = self._answers.scores.start(placed, output.hidden_RND)
        changes_B = output.changes_B if runner.is_lossy else None
        return RunningStep(placed, output.sampled, changes_B, scores, start_time, planning_seconds)

    def _fill(self, placed: PlacedRun, inputs: StepInput) -> None:
        request = placed.run.request
        fill(placed, inputs, self._end_tokens(request.params))
        if (row_V := new_counts(placed.run, self.vocab_size)) is not None:
            self.runner.replace_counts(request.state.seat, row_V)
        if (failure := constrain(placed, inputs)) is not None:
            self._fail(request, failure, invalid=True)

    def _end_tokens(self, params: SamplingParams) -> list[int]:
        ends = () if params.ignore_eos else self.end_ids
        return sorted({*ends, *params.stop_token_ids})

    # ---- results out -------------------------------------------------------------------------------

    def _deliver(self) -> None:
        """Waits for the step's end, appends each row's token to its request and emits what became certain."""
        step, self._running_step = self._running_step, None
        assert step is not None
        fetched = step.fetch()
        if fetched.num_lost:
            self._fail_step(step, fetched.num_lost)
        now = time.monotonic()
        prompt_scores, changes = jax.device_get((step.prompt_scores, step.changes_B))
        for placed in step.placed:
            run = placed.run
            run.request.state.num_in_flight -= run.is_sampled
            if run.is_sampled and run.request.state.num_stale:
                run.request.state.num_stale -= 1
                continue
            if self.runner.is_lossy and not run.is_redraw:
                count_assignments(placed, changes, self.runner.cfg)
            self._isolate(run.request, self._deliver_run, placed, prompt_scores, fetched, now)
        report = step.report(now, time.monotonic())
        for listener in self.listeners:
            tell(listener.stepped, report)

    def _deliver_run(self, placed: PlacedRun, prompt_scores: Any, fetched: FetchedStep, now: float) -> None:
        """Delivers a step's result to one request."""
        run, request, row = placed.run, placed.run.request, placed.sample_row
        self._answers.scores.keep(placed, prompt_scores)
        if request.state.is_ended or not run.is_sampled:
            return
        if not fetched.finite_B[row]:
            self.scheduler.spoil(request)
            self._fail(request, "the model produced NaN logits")
        elif request.params.max_tokens == 0:
            self._end(request, self._answers.scores_only(request))
        else:
            self._receive_token(run, int(fetched.ids_B[row]), fetched.scores(row), now)

    def _receive_token(self, run: Run, token: int, scores: tuple, now: float) -> None:
        """Delivers a token, or lets the request draw it again if its grammar refuses it."""
        request, constraint = run.request, run.request.constraint
        try:
            is_refused = constraint is not None and not run.is_masked and not constraint.is_allowed(token)
        except ValueError as error:
            self._fail(request, str(error), invalid=True)
            return
        if is_refused:
            request.note_refusal()
            self.scheduler.redraw(request)
        else:
            self._deliver_token(request, token, scores, now)

    def _deliver_token(self, request: Request, token: int, scores: tuple, now: float) -> None:
        request.token_ids.append(token)
        if request.state.rank >= 0:
            self.scheduler.name_pages(request)
        request.first_token_time = request.first_token_time or now
        for listener in self.listeners:
            listener.token(request, now)
        try:
            output = self._answers.next_output(request, token, scores)
        except ValueError as error:
            self._fail(request, str(error))
            return
        if output.finish_reason is not None:
            self._end(request, output)
        elif (failure := accept(request, token, self.end_ids)) is not None:
            self._fail(request, failure, invalid=True)
        else:
            request.emit(output)

    def _fail_step(self, step: RunningStep, num_lost: int) -> None:
        """Ends the requests of a step in which ``num_lost`` assignments to experts were not computed. Its
        tokens, and what it wrote to the pages, are wrong."""
        what = f"{num_lost} of the step's assignments to experts"
        cause = f"{what} were not computed: its answers would be wrong"
        log.error("%s. This is a fault of the engine; restart it and report it", cause)
        for placed in step.placed:
            self.scheduler.spoil(placed.run.request)
            if not placed.run.request.state.is_ended:
                self._fail(placed.run.request, cause)

    def _fail(self, request: Request, cause: str, *, invalid: bool = False) -> None:
        self._end(request, Output(request.id, finish_reason="error", error=cause, is_invalid=invalid))

    def _isolate(self, request: Request, function: Callable[..., None], *args: Any) -> None:
        """Runs the host's ``function`` for one request; if it fails, only that request ends."""
        try:
            function(*args)
        except BaseException as error:  # a panic of a Rust library is no Exception
            if ends_program(error):
                raise
            log.exception("request %s failed on the host", request.id)
            self.scheduler.spoil(request)  # its pages may hold anything
            if not request.state.is_ended:
                self._fail(request, "the request failed on the host; the log has the cause")

    def _end(self, request: Request, output: Output) -> None:
        self.scheduler.finish(request)
        self._report_end(request, output)

    def _report_end(self, request: Request, output: Output) -> None:
        self._answers.forget(request)
        reason: FinishReason = output.finish_reason or "error"
        if self.runner.is_lossy:
            output = replace(output, moe=request.moe)
        for listener in self.listeners:
            tell(listener.finished, request, reason)
        tell(request.emit, output)

    def give_up(self, reason: FinishReason, cause: str) -> None:
        """Ends every request, when no step can run any more."""
        self._running_step = None
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            tell(self.scheduler.abort, request.id)  # what broke the step may have broken its lists
            tell(self._report_end, request, Output(request.id, finish_reason=reason, error=cause))

    # ---- statistics --------------------------------------------------------------------------------

    def snapshot(self) -> EngineSnapshot:
        s = self.scheduler
        after = self.runner.compilations.num_after_warmup
        counts = s.preemptions, s.prefix.queries, s.prefix.hits, s.redraws
        is_alive = self.runner.is_alive
        return EngineSnapshot(len(s.running), len(s.waiting), s.pool.usage, is_alive, after, *counts)

    def moe_stats(self) -> dict[str, Any]:
        """Returns statistics of the experts since the start, by phase: totals, means per step, and
        counts by layer and expert, with the checkpoint's numbers of experts."""
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
        ranks = {} if self.placement is None else {"placement": self.placement.rank_LE.tolist()}
        return {"model": shape, "mesh": dict(self.runner.mesh.shape), **ranks, **phases}

    def _by_expert(self, counts_LP: np.ndarray) -> np.ndarray:
        return counts_LP if self.placement is None else self.placement.by_expert(counts_LP)
