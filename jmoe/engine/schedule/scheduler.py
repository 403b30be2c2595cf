"""Plans the next step. Pure host code over plain objects.

A step holds one token of every request that is being decoded and, on each rank, the next tokens of prompts,
as many as the budget leaves. Requests are admitted first come, first served, when a seat is free and there
are pages for the tokens that they have; pages for generated tokens are allocated one by one. If none is free,
the request that came last is preempted: its pages are freed and it later runs again from its tokens, so that
the oldest always goes on. A request that lacks pages may be overtaken by later, shorter ones,
``MAX_OVERTAKEN`` times at most. ``admission`` chooses the rank.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jmoe.engine.page_names import PageNames
from jmoe.engine.request import QueueFull, Request, RequestState
from jmoe.engine.schedule.admission import Candidate, RankChooser, candidate_at
from jmoe.engine.schedule.pages import PagePool
from jmoe.engine.schedule.plan import PromptBudget, Run, Step

MAX_OVERTAKEN = 8


@dataclass(frozen=True)
class Limits:
    """Upper limits of the scheduler.

    max_num_seqs: requests that run together on a rank.
    max_num_batched_tokens: tokens of a step on a rank; at least one page of a prompt fits in the same step
        as the decoded tokens.
    max_model_len: tokens of one sequence.
    max_queue: waiting requests.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_queue: int


@dataclass
class PrefixCounts:
    """Prompt tokens that were looked up in cached pages, and those found there."""

    queries: int = 0
    hits: int = 0


class Scheduler:
    """Plans the steps: which requests run, on which ranks and in which pages.

    pool: KV pages of all ranks.
    prefill_sizes: compiled numbers of prompt tokens per rank; the first is that of one row.
    page_kind: function that names what a request's pages depend on other than its tokens; with None no pages
        are shared.
    rank_chooser: object that chooses ranks; None = the default ``RankChooser``.
    """

    def __init__(
        self,
        pool: PagePool,
        limits: Limits,
        prefill_sizes: Sequence[int],
        page_kind: Callable[[Request], str] | None = None,
        rank_chooser: RankChooser | None = None,
    ):
        self.pool, self.limits = pool, limits
        self.prefill_sizes, self.page_kind = tuple(prefill_sizes), page_kind
        self.rank_chooser = rank_chooser or RankChooser(len(pool.ranks), limits.max_num_seqs)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.prefix, self.preemptions, self.redraws = PrefixCounts(), 0, 0
        self._num_arrivals = 0

    def pages_needed(self, request: Request) -> int:
        """Returns the number of pages for the prompt and everything it may generate (the last token's keys
        are never stored)."""
        prompt, limit = len(request.prompt_token_ids), request.params.max_tokens
        room = self.limits.max_model_len - prompt
        new = room if limit is None else min(limit, room)
        return self.pool.pages_for(prompt + max(new - 1, 0))

    def add(self, requests: list[Request]) -> None:
        """Queues all or none of the requests; raises QueueFull if they do not fit."""
        if len(self.waiting) + len(requests) > self.limits.max_queue:
            raise QueueFull(
                f"the queue is full: {len(self.waiting)} of {self.limits.max_queue} requests are waiting"
            )
        for request in requests:
            request.state = RequestState(arrival=self._num_arrivals)
            self._num_arrivals += 1
        self.waiting.extend(requests)

    # ---- a step --------------------------------------------------------------------------------------

    def next_step(self) -> Step | None:
        """Plans the next step and advances each request's state as if it had run; returns None if nothing can
        run."""
        step = Step()
        for rank in self.pool.ranks:
            rank.unwritten.clear()
        for request in self._by_age():  # oldest first: the request that came last is preempted
            if request in self.running and self._continues(request):
                self._decode(request, step)
        budgets = self._budgets(step)
        for request in self._by_age():
            if request.state.num_computed_tokens < request.state.num_prefill_tokens:
                self._prefill(request, step, budgets)
        self._admit(step, budgets)
        most = max(budget.num_used_rows for budget in budgets) * self.prefill_sizes[0]
        step.prompt_size = next(size for size in (0, *self.prefill_sizes) if size >= most)
        return step if step.decodes or step.prompts else None

    def _by_age(self) -> list[Request]:
        return sorted(self.running, key=lambda r: r.state.arrival)

    def _budgets(self, step: Step) -> list[PromptBudget]:
        """Returns what is left for prompts on each rank, without what its decoded tokens take."""
        row, page = self.prefill_sizes[0], self.pool.page_size
        left = [self.limits.max_num_batched_tokens] * len(self.pool.ranks)
        for decoded in step.decodes:
            left[decoded.request.state.rank] -= 1
        return [PromptBudget(max(tokens, page), self.prefill_sizes[-1] // row, row) for tokens in left]

    def _continues(self, request: Request) -> bool:
        """Returns whether to decode a token: all but the last sampled one are computed, and no limit is
        met."""
        state, limit = request.state, request.params.max_tokens
        reach = request.length + state.num_in_flight - state.num_stale
        new = reach - len(request.prompt_token_ids)
        if state.num_computed_tokens != reach - 1:
            return False
        return reach < self.limits.max_model_len and (limit is None or new < limit)

    def _decode(self, request: Request, step: Step) -> None:
        state, rank = request.state, self.pool.ranks[request.state.rank]
        while self.pool.pages_for(state.num_computed_tokens + 1) > len(state.block_table):
            if not self._frees_page(request):
                return
            state.block_table += rank.allocate(1)
        if state.is_redraw and not self._owns_page(request, step):
            return
        kind = {"is_decode": True, "is_sampled": True, "is_masked": request.needs_mask}
        run = Run(request, state.num_computed_tokens, 1, **kind, is_redraw=state.is_redraw)
        step.decodes.append(run)
        state.is_redraw = False
        self._advance(request, 1, is_sampled=True)

    def _frees_page(self, request: Request) -> bool:
        """Returns whether a page is free on the request's rank, preempting others; False if the request
        itself was preempted."""
        while not self.pool.ranks[request.state.rank].num_free:
            if self._preempt(request.state.rank) is request:
                return False
        return True

    def _owns_page(self, request: Request, step: Step) -> bool:
        """Gives the request a copy of the page that it writes next if others read that page: a token that is
        computed again may differ in rounding. Returns False if the request was preempted for it."""
        state, rank = request.state, self.pool.ranks[request.state.rank]
        index = state.num_computed_tokens // self.pool.page_size
        page = state.block_table[index]
        if rank.num_users[page] == 1:
            return True
        if not self._frees_page(request):
            return False
        [state.block_table[index]] = rank.allocate(1)
        step.copies.append((state.rank, page, state.block_table[index]))
        rank.free([page])
        return True

    def _preempt(self, rank: int) -> Request:
        """Preempts the running request of ``rank`` that came last: frees its pages and queues it. The request
        runs again from its tokens."""
        last = max((r for r in self.running if r.state.rank == rank), key=lambda r: r.state.arrival)
        self._leave(last)
        state = last.state
        last.state = RequestState(
            state.arrival,
            state.times_overtaken,
            num_in_flight=state.num_in_flight,
            num_stale=state.num_stale,
        )
        after = next((i for i, r in enumerate(self.waiting) if r.state.arrival > state.arrival), None)
        self.waiting.insert(len(self.waiting) if after is None else after, last)
        self.preemptions += 1
        return last

    def _prefill(self, request: Request, step: Step, budgets: list[PromptBudget]) -> None:
        """Adds the next tokens of a prompt to the step: whole pages, or up to its end. It may add none."""
        state = request.state
        start, end = state.num_computed_tokens, state.num_prefill_tokens
        count = budgets[state.rank].take(end - start, self.pool.page_size)
        if count:
            is_last = start + count == end
            kind = {"is_decode": False, "is_sampled": is_last, "is_masked": is_last and request.needs_mask}
            step.prompts.append(Run(request, start, count, **kind))
            self._advance(request, count, is_sampled=is_last)

    def _advance(self, request: Request, count: int, *, is_sampled: bool) -> None:
        request.state.num_computed_tokens += count
        request.state.num_in_flight += is_sampled
        self.name_pages(request)

    # ---- in and out ----------------------------------------------------------------------------------

    def redraw(self, request: Request) -> None:
        """Throws away a token that the request's grammar has refused, and what was drawn after it. The
        request draws it again in the next step, from the token before it."""
        state = request.state
        state.num_stale = state.num_in_flight
        if state.rank >= 0:  # otherwise it was preempted, and runs again from its tokens anyway
            state.num_computed_tokens, state.is_redraw = request.length - 1, True
        self.redraws += 1

    def name_pages(self, request: Request) -> None:
        """Names those of the request's pages whose content is known by now."""
        state, size = request.state, self.pool.page_size
        done = min(state.num_computed_tokens, request.length)
        is_prompt_end = done == state.num_prefill_tokens
        if state.page_names is None or (state.num_named_pages * size > done - size and not is_prompt_end):
            return
        rank, tokens = self.pool.ranks[state.rank], request.tokens[:done]
        names = state.page_names.full(tokens)
        for page in range(state.num_named_pages, len(names)):
            rank.name(state.block_table[page], names[page])
        state.num_named_pages = len(names)
        rest = state.page_names.rest(tokens)
        if rest is not None and is_prompt_end:
            rank.name(state.block_table[state.num_named_pages], rest)

    def finish(self, request: Request) -> None:
        """Removes the request. Nothing of it is wanted any more, not even from steps already started."""
        if request.state.rank < 0:
            self.waiting.remove(request)
        else:
            self._leave(request)
        request.state.is_ended = True

    def spoil(self, request: Request) -> None:
        """Removes the names of the request's pages, because what they hold may be wrong (not finite). The
        pages that it found in the cache lose theirs too: the request that wrote them may have ended before
        this was seen."""
        if (names := self._names(request)) is None:
            return
        rest = names.rest(request.prompt_token_ids)
        known = [*names.full(request.tokens), *([] if rest is None else [rest])]
        for rank in self.pool.ranks:
            rank.forget([rank.page_of[name] for name in known if name in rank.page_of])
        if request.state.rank >= 0:
            self.pool.ranks[request.state.rank].forget(request.state.block_table)
        request.state.page_names = None

    def abort(self, request_id: str) -> Request | None:
        """Removes and returns a request, waiting or running; returns None if it is not here (any more)."""
        found = next((r for r in (*self.running, *self.waiting) if r.id == request_id), None)
        if found is not None:
            self.finish(found)
        return found

    def _leave(self, request: Request) -> None:
        state = request.state
        self.name_pages(request)
        self.running.remove(request)
        self.pool.ranks[state.rank].free(state.block_table)
        state.block_table, state.rank = [], -1

    # ---- who enters, and where -----------------------------------------------------------------------

    def _admit(self, step: Step, budgets: list[PromptBudget]) -> None:
        passed: list[Request] = []  # requests that keep waiting, in order
        while self.waiting and len(passed) < MAX_OVERTAKEN and (ranks := self._open_ranks(budgets)):
            request = self.waiting.popleft()
            candidate = None if request.state.num_in_flight else self._best_candidate(request, ranks)
            if candidate is not None:
                self._start(request, candidate, step)
                if request.state.num_computed_tokens < request.state.num_prefill_tokens:
                    self._prefill(request, step, budgets)
                for other in passed:
                    other.state.times_overtaken += 1
            else:
                passed.append(request)
            states = [other.state for other in passed]
            if any(state.times_overtaken >= MAX_OVERTAKEN or state.num_in_flight for state in states):
                break
        self.waiting.extendleft(reversed(passed))

    def _open_ranks(self, budgets: list[PromptBudget]) -> list[int]:
        """Returns the ranks with a free seat and room for a page of a prompt."""
        counts, page = self._counts(), self.pool.page_size
        is_open = [budget.num_tokens >= page and budget.num_used_rows < budget.num_rows for budget in budgets]
        return [r for r, count in enumerate(counts) if count < self.limits.max_num_seqs and is_open[r]]

    def _counts(self) -> list[int]:
        counts = [0] * len(self.pool.ranks)
        for request in self.running:
            counts[request.state.rank] += 1
        return counts

    def _best_candidate(self, request: Request, ranks: list[int]) -> Candidate | None:
        """Returns where and how the request is admitted, or None if no rank has enough pages."""
        tokens, names = request.tokens, self._names(request)
        counts, size = self._counts(), self.pool.page_size
        each = (candidate_at(r, self.pool.ranks[r], tokens, names, size, counts[r]) for r in ranks)
        candidates = [candidate for candidate in each if candidate is not None]
        return self.rank_chooser.choose(tokens, candidates, min(counts)) if candidates else None

    def _names(self, request: Request) -> PageNames | None:
        """Returns the names of the request's pages, or None if they are not shared or all of the prompt must
        run to be scored."""
        if self.page_kind is None or request.params.prompt_logprobs is not None:
            return None
        if request.state.page_names is None:
            request.state.page_names = PageNames(self.pool.page_size, self.page_kind(request))
        return request.state.page_names

    def _start(self, request: Request, candidate: Candidate, step: Step) -> None:
        state, rank = request.state, self.pool.ranks[candidate.rank]
        partial = [] if candidate.partial_page is None else [candidate.partial_page]
        rank.share([*candidate.full_pages, *partial])
        need = self.pool.pages_for(request.length) - len(candidate.full_pages)
        state.block_table = [*candidate.full_pages, *rank.allocate(need)]
        if candidate.partial_page is not None:  # others may still write into it: this request gets a copy
            step.copies.append((candidate.rank, candidate.partial_page, state.block_table[-1]))
            rank.free([candidate.partial_page])
        seats = {r.state.seat for r in self.running}
        state.seat = next(seat for seat in range(len(seats) + 1) if seat not in seats)
        state.rank, state.num_prefill_tokens = candidate.rank, request.length
        state.num_cached_tokens = state.num_computed_tokens = candidate.num_cached_tokens
        if request.start_time is None:  # otherwise it was preempted and finds its own pages
            request.num_cached_tokens = candidate.num_cached_tokens
        state.num_named_pages = len(candidate.full_pages)
        if state.page_names is not None:
            self.prefix.queries += state.num_prefill_tokens
            self.prefix.hits += candidate.num_cached_tokens
        self.running.append(request)
        written = rank.unwritten.isdisjoint(candidate.full_pages)
        is_last = state.num_prefill_tokens - state.num_computed_tokens == 1
        if is_last and candidate.num_cached_tokens and written:  # the last token is decoded
            self._decode(request, step)
