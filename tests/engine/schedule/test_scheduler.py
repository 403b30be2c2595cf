"""Tests the engine's scheduler and pages on the host, without jax."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from jmoe.engine.request import QueueFull, Request, SamplingParams
from jmoe.engine.schedule.admission import REASONS, RankChooser
from jmoe.engine.schedule.pages import PagePool
from jmoe.engine.schedule.plan import Run, Step
from jmoe.engine.schedule.scheduler import MAX_OVERTAKEN, Limits, Scheduler
from jmoe.engine.step.inputs import Sizes


def request(name: str, prompt: int, max_tokens: int | None, token: int = 0) -> Request:
    params = SamplingParams(max_tokens=max_tokens)
    return Request(name, [token] * prompt, params, lambda output: None, 0.0)


def scheduler_of(
    pool: PagePool, seats=4, budget=64, longest=20, queue=10, dispatch=REASONS, share=None
) -> Scheduler:
    by = RankChooser(len(pool.ranks), seats, dispatch, share)
    run = pool.page_size
    limits = Limits(seats, budget, longest, queue)
    sizes = range(run, budget + run, run)
    return Scheduler(pool, limits, sizes, page_kind=lambda r: r.params.cache_salt, rank_chooser=by)


def deliver(
    scheduler: Scheduler,
    step: Step,
    token: int = 0,
    refused: Request | None = None,
    behind: Sequence[Request] = (),
) -> None:
    """Does what the engine does once a step has ended, for requests that need more than it gave. The grammar
    of ``refused`` refuses its token. What the step drew for ``behind`` was drawn after refused tokens."""
    for run in step.decodes + step.prompts:
        place = run.request.state
        place.num_in_flight -= run.is_sampled
        if run.is_sampled and place.num_stale:
            place.num_stale -= 1
        elif run.is_sampled and not place.is_ended and run.request is refused:
            scheduler.redraw(refused)
        elif run.is_sampled and not place.is_ended:
            assert run.request not in behind
            run.request.token_ids.append(token)
            if place.rank >= 0:
                scheduler.name_pages(run.request)
            if len(run.request.token_ids) == run.request.params.max_tokens or run.request.length == 20:
                scheduler.finish(run.request)


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, run, are preempted, finish and are aborted in any order, with prompts that begin alike.
    Some of their tokens are refused and drawn again.

    No page is lost, none is used by two requests unless it holds the same for both, and every request
    computes each token once, or once more after a preemption or a refused token.
    """

    RANKS, PAGES, SIZE = 2, 6, 4

    def __init__(self):
        super().__init__()
        self.pool = PagePool(self.RANKS, self.PAGES, self.SIZE)
        self.scheduler = scheduler_of(self.pool, seats=2, budget=10, queue=5)
        self.order: list[Request] = []
        self.started: Step | None = None  # the step that runs and is not delivered yet
        self.held: dict[tuple[int, int], tuple] = {}  # (rank, page) -> tokens that were written
        self.refused: Request | None = None  # the request whose token of the started step will be refused
        self.behind: list[Request] = []  # the requests for which the started step follows a refused token

    @rule(prompt=st.integers(1, 12), new=st.one_of(st.none(), st.integers(1, 8)), kind=st.integers(0, 2))
    def add(self, prompt, new, kind):
        made = request(str(len(self.order)), prompt, new)
        made.prompt_token_ids[:] = [7] * (prompt // 2) + [kind] * (prompt - prompt // 2)
        if len(self.scheduler.waiting) >= 5:
            with pytest.raises(QueueFull):
                self.scheduler.add([made])
        else:
            self.scheduler.add([made])
            self.order.append(made)

    @rule(refused=st.one_of(st.none(), st.integers(0, 3)))
    def step(self, refused: int | None = None):
        """Starts the next step before the one before it is delivered."""
        started = [] if self.started is None else self.started.decodes + self.started.prompts
        drawn = [run.request for run in started if run.is_sampled and not run.is_redraw]
        can = [request for request in drawn if not request.state.num_stale]
        self.refused = None if refused is None or refused >= len(can) else can[refused]
        step = self.scheduler.next_step()
        if step is not None:
            self._compute(step)
        elif self.started is None:
            assert not self.scheduler.running and not self.scheduler.waiting
        if self.started is not None:
            deliver(self.scheduler, self.started, refused=self.refused, behind=self.behind)
        runs = [] if step is None or self.refused is None else step.decodes
        self.behind = [run.request for run in runs if run.request is self.refused]
        self.started = step

    def _compute(self, step: Step) -> None:
        """Writes the runs' tokens, each after earlier ones, all of which must be the request's own.

        A layer of the model writes and reads what is decoded, then writes all prompts and reads them.
        """
        for rank in range(self.RANKS):
            counts = [-(-run.count // self.SIZE) for run in step.prompts if run.request.state.rank == rank]
            assert sum(counts) * self.SIZE <= step.prompt_size
        for rank, source, target in step.copies:
            self.held[rank, target] = self.held[rank, source]
        for piece in ([[run] for run in step.decodes], [step.prompts]):
            for runs in piece:
                for run in runs:
                    self._write(run)
                for run in runs:
                    self._read(run)

    def _write(self, run: Run) -> None:
        place, tokens = run.request.state, self._tokens(run)
        assert run.is_decode or run.start % self.SIZE == 0
        for at in range(run.start, run.start + run.count):
            page = place.rank, place.block_table[at // self.SIZE]
            before = self.held.get(page, ())[: at % self.SIZE]
            first = at - at % self.SIZE
            assert list(before) == tokens[first:at], "what came before is there"
            self.held[page] = (*before, tokens[at])

    def _read(self, run: Run) -> None:
        place, tokens = run.request.state, self._tokens(run)
        for index in range((run.start + run.count) // self.SIZE):
            want = tuple(tokens[index * self.SIZE : (index + 1) * self.SIZE])
            assert self.held[place.rank, place.block_table[index]] == want

    def _tokens(self, run: Run) -> list[int]:
        """Returns the request's tokens, and the one that only the device knows."""
        return [*run.request.tokens, 99 if run.request is self.refused else 0]

    @rule(data=st.data())
    def abort(self, data):
        if self.order:
            chosen = data.draw(st.sampled_from(self.order))
            here = chosen in self.scheduler.running or chosen in self.scheduler.waiting
            assert (self.scheduler.abort(chosen.id) is chosen) == here
            assert not chosen.state.block_table, "its pages are free at once"

    @invariant()
    def pages_are_conserved(self):
        for number, rank in enumerate(self.pool.ranks):
            users = [0] * self.PAGES
            for r in self.scheduler.running:
                for page in r.state.block_table if r.state.rank == number else ():
                    users[page] += 1
            assert rank.num_users == users
            used = [page for page, n in enumerate(users) if n]
            assert sorted([*rank.blank, *rank.cached, *used]) == list(range(6))
            assert all(rank.page_of[name] == p for p in range(self.PAGES) for name in rank.names[p])
            assert sum(r.state.rank == number for r in self.scheduler.running) <= 2

    @invariant()
    def seats_are_their_own(self):
        seats = [r.state.seat for r in self.scheduler.running]
        assert len(set(seats)) == len(seats) and all(0 <= seat < 4 for seat in seats)

    @invariant()
    def nobody_is_passed_without_end(self):
        assert all(r.state.times_overtaken <= MAX_OVERTAKEN for r in self.order)

    def teardown(self):
        """Checks that without new requests everything ends and all pages are free."""
        for _ in range(400):
            self.step()
        assert self.started is None and self.pool.usage == 0


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def admitted(scheduler: Scheduler, count: int) -> list[int]:
    """Returns the ranks of the next ``count`` requests that enter."""
    ranks = []
    while len(ranks) < count:
        before = set(map(id, scheduler.running))
        scheduler.next_step()
        ranks += [r.state.rank for r in scheduler.running if id(r) not in before]
    return ranks


def test_a_request_goes_where_most_of_its_experts_are_and_no_rank_stays_idle():
    wishes = {5: [0.1, 0.7, 0.2], 6: [0.6, 0.3, 0.1]}
    scheduler = scheduler_of(PagePool(3, 6, 4), seats=2, share=lambda ids: wishes[ids[0]])
    scheduler.add([request(str(i), 1, 2, token) for i, token in enumerate([5, 5, 6])])
    # The second 5 finds rank 1 taken already; the 6 takes what is left; then a new round begins.
    assert admitted(scheduler, 3) == [1, 2, 0]
    assert scheduler.rank_chooser.round == set()


@pytest.mark.parametrize(
    ("dispatch", "want"),
    [(("prefix", "load"), [0, 0]), (("load",), [0, 1]), (("experts", "load"), [0, 2]), ((), [1, 2])],
    ids=str,
)
def test_the_reasons_of_the_dispatch_go_in_their_order_and_each_can_be_left_out(dispatch, want):
    """The same prompt comes twice, on three ranks; at its second time, its experts are on the last rank."""
    share = iter([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    scheduler = scheduler_of(PagePool(3, 6, 4), share=lambda ids: next(share), dispatch=dispatch)
    ranks = []
    for i in range(2):
        scheduler.add([request(str(i), 9, 4)])
        ranks += admitted(scheduler, 1)
    assert ranks == want


def test_a_rank_that_is_much_busier_is_not_chosen_for_its_pages():
    scheduler = scheduler_of(PagePool(2, 30, 4), seats=4)
    ranks = []
    for i in range(4):
        scheduler.add([request(str(i), 9, 4)])
        ranks += admitted(scheduler, 1)
    assert ranks == [0, 0, 1, 0], "half its places more than the other is too many"


def test_the_pages_of_everything_it_may_generate_must_be_there_in_all():
    scheduler = scheduler_of(PagePool(1, 8, 4))
    assert scheduler.pages_needed(request("a", 5, 3)) == 2  # 5 + 2 stored tokens
    assert scheduler.pages_needed(request("a", 5, 5)) == 3
    assert scheduler.pages_needed(request("a", 5, None)) == 5  # to the end of the context
    assert scheduler.pages_needed(request("a", 8, 0)) == 2


def test_prompts_are_cut_to_the_budget_that_decoding_leaves():
    scheduler = scheduler_of(PagePool(1, 40, 4), budget=10, longest=100)
    scheduler.add([request("0", 3, 50), request("1", 21, 50, token=1)])
    first = scheduler.next_step()
    runs = [(r.request.id, r.start, r.count, r.is_sampled) for r in first.prompts]
    assert runs == [("0", 0, 3, True), ("1", 0, 4, False)] and not first.decodes
    assert first.prompt_size == 8, "a row of 4 tokens each"
    deliver(scheduler, first)
    seen = []
    while not seen or not seen[-1][-1]:
        step = scheduler.next_step()
        assert [r.request.id for r in step.decodes] == ["0"], (
            "decoding goes on in the same step as the prompt"
        )
        seen += [(r.start, r.count, r.is_sampled) for r in step.prompts]
        deliver(scheduler, step)
    assert seen == [(4, 8, False), (12, 9, True)], "within 10 - 1 tokens whole pages of 4, or to the end"


def test_a_step_holds_as_many_prompts_as_its_budget_and_the_oldest_goes_on_first():
    scheduler = scheduler_of(PagePool(1, 40, 4), budget=16, longest=100)
    lengths = [3, 6, 9, 2]
    scheduler.add([request(str(i), n, 50, token=i) for i, n in enumerate(lengths)])
    steps = [scheduler.next_step() for _ in range(2)]
    runs = [[(r.request.id, r.start, r.count) for r in step.prompts] for step in steps]
    assert runs == [[("0", 0, 3), ("1", 0, 6), ("2", 0, 4)], [("2", 4, 5), ("3", 0, 2)]]
    assert [step.prompt_size for step in steps] == [16, 12] and len(steps[1].decodes) == 2


def test_prompts_of_one_step_read_the_pages_that_it_writes_and_copy_none():
    scheduler = scheduler_of(PagePool(1, 40, 4), longest=100)
    scheduler.add([request("0", 10, 50), request("same", 10, 50), request("even", 8, 50)])
    step = scheduler.next_step()
    assert [(r.request.id, r.start, r.count) for r in step.prompts] == [
        ("0", 0, 10), ("same", 8, 2), ("even", 4, 4),
    ]  # fmt: skip
    assert not step.copies and not step.decodes
    first, same, even = (run.request.state.block_table for run in step.prompts)
    assert first[:2] == same[:2] and first[0] == even[0] and first[1] != even[1]


def test_a_prompt_that_waits_for_pages_is_overtaken_a_few_times_only():
    scheduler = scheduler_of(PagePool(1, 8, 4), seats=8, queue=100, longest=32)
    scheduler.add([request("first", 16, 1)])
    scheduler.next_step()  # it is not delivered, and so holds its pages
    scheduler.add([request("long", 24, 4, token=1000)])
    entered = []
    for i in range(3 * MAX_OVERTAKEN):
        scheduler.add([request(str(i), 1, 1, token=i + 1)])
        step = scheduler.next_step()
        for run in step.prompts if step is not None else ():
            entered.append(run.request.id)
            scheduler.finish(run.request)
    assert entered == [str(i) for i in range(MAX_OVERTAKEN)]
    scheduler.finish(scheduler.running[0])
    assert scheduler.next_step().prompts[0].request.id == "long"


def test_the_latest_gives_way_and_runs_again_from_its_tokens():
    scheduler = scheduler_of(PagePool(1, 4, 4), longest=16)
    old, young = request("old", 4, 12), request("young", 4, 8, token=1)
    scheduler.add([old, young])
    while not scheduler.preemptions:
        deliver(scheduler, scheduler.next_step())
    assert old in scheduler.running and list(scheduler.waiting) == [young] and young.state.rank == -1
    delivered = list(young.token_ids)
    while young.state.rank < 0:
        deliver(scheduler, scheduler.next_step())
    assert old.state.is_ended and len(old.token_ids) == 12, "the oldest went on to its end"
    assert young.token_ids[: len(delivered)] == delivered and young.state.num_prefill_tokens == 4 + len(
        delivered
    )


def test_pages_serve_equal_beginnings_of_one_kind_and_a_part_of_one_is_copied():
    scheduler = scheduler_of(PagePool(1, 40, 4), seats=8, longest=100)

    def enter(
        name: str, tokens: list[int], salt: str = "", scores: int | None = None
    ) -> tuple[Request, Step]:
        params = SamplingParams(max_tokens=4, cache_salt=salt, prompt_logprobs=scores)
        made = Request(name, tokens, params, lambda output: None, 0.0)
        scheduler.add([made])
        step = scheduler.next_step()
        assert made.state.num_prefill_tokens == len(tokens)
        return made, step

    prompt = list(range(10))
    first, _ = enter("first", prompt)
    same, step = enter("same", prompt)
    assert (
        same.state.block_table[:2] == first.state.block_table[:2]
        and same.state.block_table[2] != first.state.block_table[2]
    )
    assert step.copies == [(0, first.state.block_table[2], same.state.block_table[2])]
    assert [(r.request.id, r.start, r.count) for r in step.decodes if r.request is same] == [("same", 9, 1)]
    longer, step = enter("longer", [*prompt, 10, 11, 12])
    assert (
        longer.state.block_table[:2] == first.state.block_table[:2]
        and step.prompts[0].start == 8
        and not step.copies
    )
    even, _ = enter("even", prompt[:8])
    assert even.state.num_cached_tokens == 7 and even.state.block_table[0] == first.state.block_table[0], (
        "the last page is copied"
    )
    assert [r.num_cached_tokens for r in (first, same, longer, even)] == [0, 9, 8, 7]
    for other, _ in (enter("salted", prompt, salt="x"), enter("scored", prompt, scores=0)):
        assert other.state.num_cached_tokens == other.num_cached_tokens == 0
        assert not set(other.state.block_table) & set(first.state.block_table)
    assert (scheduler.prefix.queries, scheduler.prefix.hits) == (10 + 10 + 13 + 8 + 10, 9 + 8 + 7)


@given(st.integers(1, 3000))
def test_prefill_runs_cover_the_prompt_with_little_padding(left: int):
    sizes = Sizes((1,), (64, 256, 1024), 32, 1, 1)
    padded = real = 0
    while left > 0:
        size = sizes.prefill_size(left)
        assert size in sizes.prefill
        padded += size
        real += min(size, left)
        left -= size
    assert padded <= max(2 * real, 64)


def test_a_request_may_give_way_while_a_token_after_a_refused_one_is_in_flight():
    """The younger request's token is refused in one step after the other, until it is just then preempted."""
    num_met = 0
    for at in range(12):
        scheduler, younger = scheduler_of(PagePool(1, 4, 4)), request("1", 3, 9, token=1)
        scheduler.add([request("0", 3, 9), younger])
        started, behind = None, []
        for number in range(60):
            drawn = [] if started is None else started.decodes + started.prompts
            is_drawn = any(run.request is younger and run.is_sampled for run in drawn)
            refused = younger if number == at and is_drawn and not behind else None
            step = scheduler.next_step()
            num_met += bool(behind) and younger.state.rank < 0
            if started is not None:
                deliver(scheduler, started, refused=refused, behind=behind)
            runs = [] if step is None or refused is None else step.decodes
            behind = [run.request for run in runs if run.request is refused]
            started = step
        assert len(younger.token_ids) == 9 and scheduler.pool.usage == 0
    assert num_met > 0
