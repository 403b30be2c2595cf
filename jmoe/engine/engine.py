"""The engine: a step is schedule -> run -> deliver. Synchronous; ``worker`` gives it a thread of its own."""

import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Protocol

import jax
import numpy as np

from jmoe.engine.request import (
    EngineDead,
    EngineSnapshot,
    FinishReason,
    Output,
    Request,
    SamplingParams,
    StepReport,
    TokenLogprob,
)
from jmoe.engine.runner import Runner
from jmoe.engine.sampling import Sampled
from jmoe.engine.scheduler import Scheduler
from jmoe.engine.step import BANNED, StepInput
from jmoe.engine.text import Detokenizer, TextCodec
from jmoe.moe.placement import Placement
from jmoe.moe.types import Changes

Alternatives = tuple[np.ndarray, np.ndarray, np.ndarray]  # logprob, top ids, top logprobs of some rows


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
        self.max_model_len, self.vocab_size = scheduler.max_model_len, runner.cfg.vocab_size
        self.listeners: list[Listener] = []
        self._texts: dict[str, Detokenizer] = {}
        self._prompt_scores: dict[str, list[TokenLogprob | None]] = {}
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
        if params.min_tokens and len(self._banned(params)) > BANNED:
            raise ValueError(f"min_tokens with more than {BANNED} end tokens is not supported")
        if self.codec is None and params.stop:
            raise ValueError("stop strings need a tokenizer, which this model directory does not have")

    def add(self, requests: list[Request]) -> None:
        """Queues all or none. Raises ValueError for a bad one, QueueFull where there is no room."""
        if len(requests) > self.scheduler.max_queue:
            raise ValueError(
                f"{len(requests)} requests at once exceed the queue of {self.scheduler.max_queue}"
            )
        for request in requests:
            self.check(request)
        self.scheduler.add(requests)
        for request in requests:
            if self.codec is not None:
                self._texts[request.id] = Detokenizer(self.codec, request.params.stop)
            if request.params.prompt_logprobs is not None:
                self._prompt_scores[request.id] = [None]

    def abort(self, request_id: str) -> None:
        """Ends a request wherever it is; unknown ids are finished ones and change nothing."""
        request = self.scheduler.drop(request_id)
        if request is not None:
            self._ended(request, Output(request_id, finish_reason="abort"))

    def run(self, requests: list[Request]) -> None:
        """Serves ``requests`` to their ends, feeding the queue as it has room."""
        for request in requests:
            self.check(request)
        left = requests[::-1]
        scheduler = self.scheduler
        while left or scheduler.running or scheduler.waiting:
            while left and len(scheduler.waiting) < scheduler.max_queue:
                self.add([left.pop()])
            self.step()

    # ---- one step ----------------------------------------------------------------------------------

    def step(self) -> bool:
        """Runs one step; False where there was nothing to run."""
        step = self.scheduler.next_step()
        if step is None:
            return False
        if step.prefill:
            self._prefill(step.requests)
        else:
            self._decode(step.requests)
        return True

    def _prefill(self, requests: list[Request]) -> None:
        sizes = self.runner.sizes
        runs = {r.id: len(r.prompt_token_ids) - r.prefilled for r in requests}
        tokens = sizes.prefill_size(max(runs.values()))
        given = self.runner.blank(1, tokens)
        for request in requests:
            request.started = request.started or time.monotonic()
            start, n = request.prefilled, min(runs[request.id], tokens)
            row = request.rank
            given.tokens_BT[row, :n] = request.prompt_token_ids[start : start + n]
            given.positions_BT[row, :n] = np.arange(start, start + n)
            given.last_B[row] = n - 1
            self._fill_row(given, row, request)
            request.prefilled += n
        sampled, hidden, changes = self.runner.run(given)
        self._count_assignments([(r, r.rank) for r in requests], given, changes)
        self._score_prompts(requests, given, hidden)
        self._deliver([(r, r.rank) for r in requests if r.prefilled == len(r.prompt_token_ids)], sampled)

    def _decode(self, requests: list[Request]) -> None:
        sizes, ranks = self.runner.sizes, self.runner.ranks
        by_rank: list[list[Request]] = [[] for _ in range(ranks)]
        for request in requests:
            by_rank[request.rank].append(request)
        b = sizes.decode_size(max(map(len, by_rank)))
        given = self.runner.blank(b, 1)
        placed = [(r, rank * b + i) for rank, mine in enumerate(by_rank) for i, r in enumerate(mine)]
        for request, row in placed:
            given.tokens_BT[row, 0] = request.token_ids[-1]
            given.positions_BT[row, 0] = request.length - 1
            self._fill_row(given, row, request)
        sampled, _, changes = self.runner.run(given)
        self._count_assignments(placed, given, changes)
        self._deliver(placed, sampled)

    def _fill_row(self, given: StepInput, row: int, request: Request) -> None:
        """Page table and sampling parameters of one row."""
        params, rows = request.params, given.rows
        given.table_BM[row, : len(request.pages)] = request.pages
        rows.temperature_B[row], rows.top_p_B[row] = params.temperature, params.top_p
        rows.top_k_B[row] = max(params.top_k, 0)
        rows.seed_B[row] = _fold(params.seed or 0)
        rows.position_B[row] = request.length
        given.exact_B[row], given.seats_B[row] = params.exact, request.seat
        if len(request.token_ids) < params.min_tokens:
            banned = self._banned(params)
            rows.banned_BX[row, : len(banned)] = banned
        if params.logprobs is not None:
            rows.logprobs[...] = True

    def _banned(self, params: SamplingParams) -> list[int]:
        ends = () if params.ignore_eos else self.end_ids
        return sorted({*ends, *params.stop_token_ids})

    def _score_prompts(self, requests: list[Request], given: StepInput, hidden: jax.Array) -> None:
        """Log-probabilities of the prompt tokens that this run's positions predict."""
        following: dict[str, list[int]] = {}
        targets = np.zeros_like(given.tokens_BT)
        for r in requests:
            if r.params.prompt_logprobs is not None:
                start, end = int(given.positions_BT[r.rank, 0]), int(given.positions_BT[r.rank].max()) + 1
                following[r.id] = r.prompt_token_ids[start + 1 : end + 1]
                targets[r.rank, : len(following[r.id])] = following[r.id]
        if not following:
            return
        scores = self.runner.score(hidden, targets)
        for r in requests:
            asked = r.params.prompt_logprobs or 0
            self._prompt_scores.get(r.id, []).extend(
                _token_logprob(token, tuple(s[r.rank, i] for s in scores), asked)
                for i, token in enumerate(following.get(r.id, []))
            )

    def _count_assignments(
        self, placed: list[tuple[Request, int]], given: StepInput, changes: Changes | None
    ) -> None:
        """What the step did to each request's assignments, where it may have done something to them."""
        if not self.runner.lossy:
            return
        cfg = self.runner.cfg
        tokens_B = np.sum(given.positions_BT >= 0, axis=1)
        counts = None if changes is None else jax.device_get(changes)
        for request, row in placed:
            request.moe.assignments += int(tokens_B[row]) * len(cfg.moe_layers) * cfg.num_experts_per_tok
            if counts is not None:
                request.moe.remapped += int(counts.remapped_T[row])
                request.moe.dropped += int(counts.dropped_T[row])
                request.moe.rerouted += int(counts.rerouted_T[row])

    # ---- results out -------------------------------------------------------------------------------

    def _deliver(self, placed: list[tuple[Request, int]], sampled: Sampled) -> None:
        """Appends each row's token to its request and emits what became certain."""
        ids, *scores, finite = jax.device_get(
            (sampled.ids_B, sampled.logprob_B, sampled.top_ids_BA, sampled.top_logprobs_BA, sampled.finite_B)
        )
        now = time.monotonic()
        for request, row in placed:
            if not finite[row]:
                self._end(
                    request, Output(request.id, finish_reason="error", error="the model produced NaN logits")
                )
            elif request.params.max_tokens == 0:
                self._end(request, self._output(request, (), finish_reason="length"))
            else:
                self._deliver_token(request, int(ids[row]), tuple(s[row] for s in scores), now)

    def _deliver_token(self, request: Request, token: int, scores: tuple, now: float) -> None:
        request.token_ids.append(token)
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
            logprobs = (_token_logprob(token, scores, params.logprobs),)
        output = self._output(
            request, (token,), text=text, logprobs=logprobs, finish_reason=finish, stop_reason=stopped_by
        )
        if finish is None:
            request.emit(output)
        else:
            self._end(request, output)

    def _output(self, request: Request, token_ids: tuple[int, ...], **fields: Any) -> Output:
        prompt = self._prompt_scores.pop(request.id, None)
        scores = None if prompt is None else tuple(prompt)
        return Output(request.id, token_ids, prompt_logprobs=scores, **fields)

    def _end(self, request: Request, output: Output) -> None:
        self.scheduler.finish(request)
        self._ended(request, output)

    def _ended(self, request: Request, output: Output) -> None:
        self._texts.pop(request.id, None)
        self._prompt_scores.pop(request.id, None)
        reason: FinishReason = output.finish_reason or "error"
        if self.runner.lossy:
            output = replace(output, moe=request.moe)
        for listener in self.listeners:
            listener.finished(request, reason)
        request.emit(output)

    def give_up(self, reason: FinishReason, cause: str) -> None:
        """Ends every request, once no step can run any more."""
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            self.scheduler.drop(request.id)
            self._ended(request, Output(request.id, finish_reason=reason, error=cause))

    # ---- looking in --------------------------------------------------------------------------------

    def snapshot(self) -> EngineSnapshot:
        s = self.scheduler
        after = self.runner.compilations.after_warm_up
        return EngineSnapshot(len(s.running), len(s.waiting), s.pool.usage, self.runner.alive, after)

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
        return {"model": shape, "mesh": dict(self.runner.mesh.shape), **phases}

    def _by_expert(self, counts_LP: np.ndarray) -> np.ndarray:
        return counts_LP if self.placement is None else self.placement.by_expert(counts_LP)


def _fold(seed: int) -> np.int32:
    """64 bits of seed in 32."""
    return np.uint32((seed ^ seed >> 32) & 0xFFFFFFFF).view(np.int32)


def _token_logprob(token: int, scores: tuple, alternatives: int) -> TokenLogprob:
    """The token's log-probability and the ``alternatives`` likeliest tokens, itself always among them."""
    logprob, top_ids, top = scores
    pairs = [(int(i), float(p)) for i, p in zip(top_ids[:alternatives], top[:alternatives], strict=True)]
    if token not in (i for i, _ in pairs):
        pairs.append((token, float(logprob)))
    return TokenLogprob(token, next(p for i, p in pairs if i == token), tuple(pairs))
