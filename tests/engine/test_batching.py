"""Tests requests together: prompts and decoding in one step, shared pages, preemption, one step ahead."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from support.models.engines import CFG, GREEDY, engine_on, prompts, serve
from support.models.small import mesh_of, tokens

from jmoe.config.moe import MoEConfig
from jmoe.config.techniques import BinningConfig, CapacityConfig
from jmoe.engine.engine import Engine
from jmoe.engine.reports import StepReport
from jmoe.engine.request import Output, Request, SamplingParams
from jmoe.mesh import make_mesh

HARSH = MoEConfig(capacity=CapacityConfig(factor=0.5, phase="both"))
EXACT = dataclasses.replace(GREEDY, exact=True)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return engine_on(make_mesh())


class Reports:
    """A listener that keeps the reports of all steps."""

    def __init__(self, engine: Engine):
        self.steps: list[StepReport] = []
        engine.listeners.append(self)

    def token(self, request: Request, now: float) -> None: ...

    def finished(self, request: Request, reason: str) -> None: ...

    def stepped(self, report: StepReport) -> None:
        self.steps.append(report)


def answer(engine: Engine, prompt, params: SamplingParams = GREEDY) -> list[int]:
    return serve(engine, [prompt], params)[0][0].token_ids


def hits(engine: Engine, run: Callable[[], object]) -> int:
    before = engine.snapshot().prefix_hits
    run()
    return engine.snapshot().prefix_hits - before


def test_long_prompts_run_in_pieces_while_others_decode_and_change_no_token(engine: Engine):
    first, long = tokens(CFG, 5, seed=31), tokens(CFG, 48, seed=32)
    alone = [answer(engine_on(make_mesh(), enable_prefix_caching=False), p) for p in (first, long)]
    reports = Reports(engine)
    requests, _ = serve(engine, [first, long])
    engine.listeners.remove(reports)
    assert [r.token_ids for r in requests] == alone
    steps = [(s.prompt_tokens, s.decode_tokens) for s in reports.steps]
    assert steps[:3] == [(5 + 16, 0), (32, 1), (0, 2)], "rows of 16 tokens, two a step"
    assert all(0 < s.host_seconds < s.seconds + 1 for s in reports.steps)


@pytest.mark.parametrize("shape", [(1, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.matrix)], ids=str)
def test_equal_beginnings_run_once_and_give_the_same_tokens(engine: Engine, shape):
    """Whole pages, a part of one, or all of a prompt are equal; then generated tokens, as in a chat."""
    on = engine if shape == (1, 1, 1) else engine_on(mesh_of(shape), first=2)
    prompt = tokens(CFG, 21, seed=41)
    cold = answer(on, prompt)
    for again, found in ((prompt, 20), (prompt[:16], 15), ([*prompt, 3, 4], 16), ([*prompt, *cold], 32)):
        fresh = answer(engine_on(make_mesh(), enable_prefix_caching=False), again)
        outputs: list[list[int]] = []
        assert hits(on, lambda again=again, out=outputs: out.append(answer(on, again))) == found
        assert outputs == [fresh]


def test_equal_beginnings_that_come_together_run_once_too(engine: Engine):
    """In one step the second request reads pages that the first writes."""
    begin = [int(t) for t in tokens(CFG, 8, seed=43)]
    both = [[*begin, 5, 6], [*begin, 7, 8, 9]]
    alone = [answer(engine_on(make_mesh(), enable_prefix_caching=False), prompt) for prompt in both]
    reports = Reports(engine)
    requests, _ = serve(engine, both)
    engine.listeners.remove(reports)
    assert reports.steps[0].prompt_tokens == 10 + 3
    assert [r.token_ids for r in requests] == alone


def test_a_salt_or_scores_of_the_prompt_find_nothing(engine: Engine):
    prompt = tokens(CFG, 21, seed=42)
    answer(engine, prompt)
    salted = dataclasses.replace(GREEDY, cache_salt="mine")
    assert hits(engine, lambda: answer(engine, prompt, salted)) == 0
    assert hits(engine, lambda: answer(engine, prompt, salted)) == 20
    assert hits(engine, lambda: answer(engine, prompt, dataclasses.replace(GREEDY, prompt_logprobs=0))) == 0


def test_an_exact_request_never_reuses_pages_of_a_lossy_one(engine: Engine):
    prompt = tokens(CFG, 30, seed=43)
    lossless, harsh = answer(engine, prompt), engine_on(make_mesh(), HARSH)
    lossy = answer(harsh, prompt)
    assert lossy != lossless
    assert hits(harsh, lambda: answer(harsh, prompt)) > 0, "lossy ones may share"
    exact: list[list[int]] = []
    assert hits(harsh, lambda: exact.append(answer(harsh, prompt, EXACT))) == 0
    assert hits(harsh, lambda: exact.append(answer(harsh, prompt, EXACT))) > 0
    assert exact == [lossless] * 2
    harsh.runner.knobs["capacity.factor"] = 0.75
    assert hits(harsh, lambda: answer(harsh, prompt)) == 0, "pages of another limit are others"


@pytest.mark.parametrize("shape", [(1, 1, 1), pytest.param((2, 1, 1), marks=pytest.mark.matrix)], ids=str)
def test_requests_that_give_way_end_with_the_same_tokens(engine: Engine, shape):
    many = prompts(8, seed=51)
    want = [answer(engine, p) for p in many]
    tight = engine_on(mesh_of(shape), pages=9, warm_up=True)
    before = tight.runner.compilations.num_after_warmup
    assert [r.token_ids for r in serve(tight, many)[0]] == want
    seen = tight.snapshot()
    assert seen.preemptions > 0 and seen.kv_usage == 0 and seen.num_running == seen.num_waiting == 0
    assert tight.runner.compilations.num_after_warmup == before


def test_scores_of_a_prompt_are_reported_once_even_if_it_runs_again():
    tight, roomy = engine_on(make_mesh(), pages=9), engine_on(make_mesh())
    many, params = prompts(6, seed=52), dataclasses.replace(GREEDY, prompt_logprobs=1, logprobs=0)
    scores = [
        [[e if e is None else (e.token_id, round(e.logprob, 3)) for e in parts[0].prompt_logprobs]
         for parts in serve(engine, many, params)[1]]
        for engine in (tight, roomy)
    ]  # fmt: skip
    assert scores[0] == scores[1] and tight.snapshot().preemptions > 0
    assert [len(each) for each in scores[0]] == [len(p) for p in many]


def test_the_next_step_starts_before_the_last_one_is_delivered(engine: Engine):
    began, got, run = [], [], engine.runner.run

    def counted(given):
        began.append(len(got))
        return run(given)

    engine.runner.run = counted
    try:
        engine.add([Request("ahead", [5, 6, 7], GREEDY, got.append, 0.0)])
        while engine.busy:
            engine.step()
    finally:
        engine.runner.run = run
    assert began == [0, *range(11)], "step n starts when n - 2 tokens are delivered"
    assert len(got) == 12


def test_an_answer_that_ends_leaves_its_row_in_the_next_step(engine: Engine):
    """Its pages are free at once, and the request that gets them is not disturbed."""
    prompt = tokens(CFG, 7, seed=61)
    free = answer(engine, prompt)
    stop = dataclasses.replace(GREEDY, stop_token_ids=(free[4],))
    others = prompts(6, seed=62)
    quiet = [answer(engine, p) for p in others]
    tight = engine_on(make_mesh(), pages=12)
    requests, _ = serve(tight, [prompt, *others], [stop, *[GREEDY] * 6])
    assert requests[0].token_ids == free[: free.index(free[4]) + 1]
    assert [r.token_ids for r in requests[1:]] == quiet
    assert tight.snapshot().kv_usage == 0


@pytest.mark.parametrize("steps", range(5))
def test_an_abort_frees_pages_and_place_at_once_wherever_it_comes(engine: Engine, steps: int):
    ends: list[Output] = []
    engine.add([Request("gone", list(map(int, tokens(CFG, 40, seed=63))), GREEDY, ends.append, 0.0)])
    for _ in range(steps):
        engine.step()
    engine.abort("gone")
    reported = len(ends)
    snapshot = engine.snapshot()
    assert (snapshot.kv_usage, snapshot.num_running, snapshot.num_waiting) == (0, 0, 0)
    while engine.busy:
        engine.step()
    assert len(ends) == reported and ends[-1].finish_reason == "abort", "nothing is reported after the end"


# ---- what an answer may be -------------------------------------------------------------------------


class Only:
    """A constraint: the answer is these tokens, and it fails at token number ``fails``."""

    is_open = False

    def __init__(self, wanted: list[int], fails: int | None = None):
        self.wanted, self.fails, self.taken = wanted, fails, []

    def allowed(self) -> np.ndarray:
        if len(self.taken) == self.fails:
            raise ValueError("the grammar is broken")
        words = np.zeros(-(-CFG.vocab_size // 32), np.uint32)
        token = self.wanted[len(self.taken)]
        words[token // 32] |= np.uint32(1 << token % 32)
        return words

    def is_allowed(self, token_id: int) -> bool:
        return token_id == self.wanted[len(self.taken)]

    def accept(self, token_id: int) -> None:
        self.taken.append(token_id)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_constrained_answer_holds_only_allowed_tokens_and_disturbs_no_other(engine: Engine, temperature):
    wanted = [40, 3, 95, 64, 31, 32]
    params = SamplingParams(max_tokens=6, temperature=temperature, seed=3, logprobs=0)
    got: list[Output] = []
    requests = [Request("one", [1, 2], params, got.append, 0.0, constraint=Only(wanted))]
    other = prompts(1, seed=71)[0]
    quiet = answer(engine, other)
    requests.append(Request("two", list(map(int, other)), GREEDY, lambda output: None, 0.0))
    engine.run(requests)
    assert requests[0].token_ids == wanted and requests[1].token_ids == quiet
    assert all(o.logprobs[0].logprob < 0 for o in got), "scores are those of the model"


def test_a_broken_constraint_ends_its_request_alone(engine: Engine):
    got: list[Output] = []
    broken = Request("broken", [1, 2], GREEDY, got.append, 0.0, constraint=Only([5] * 12, fails=3))
    fine = Request("fine", [1, 2], GREEDY, lambda output: None, 0.0)
    engine.run([broken, fine])
    assert got[-1].finish_reason == "error" and "grammar is broken" in got[-1].error and got[-1].is_invalid
    assert broken.token_ids == [5, 5, 5] and len(fine.token_ids) == 12
    assert engine.snapshot().kv_usage == 0


def test_biases_add_to_the_logits(engine: Engine):
    prompt = tokens(CFG, 5, seed=81)
    free = answer(engine, prompt)
    up = dataclasses.replace(GREEDY, logit_bias=((9, 100.0),), max_tokens=4)
    assert answer(engine, prompt, up) == [9] * 4
    down = dataclasses.replace(GREEDY, logit_bias=((free[0], -100.0),), max_tokens=1)
    assert answer(engine, prompt, down) != free[:1]
    with pytest.raises(ValueError, match="logit_bias: token id 96 is outside the vocabulary of 96"):
        answer(engine, prompt, dataclasses.replace(GREEDY, logit_bias=((96, 1.0),)))


# ---- lossy techniques in steps of both kinds -------------------------------------------------------


def test_a_limit_for_prompts_spares_what_is_decoded_in_the_same_step():
    moe = MoEConfig(capacity=CapacityConfig(factor=0.25, phase="prefill"))
    limited = engine_on(make_mesh(), moe, enable_prefix_caching=False)
    first, long = tokens(CFG, 20, seed=31), tokens(CFG, 48, seed=32)  # the first fills a step
    short = dataclasses.replace(GREEDY, exact=True)
    _, outputs = serve(limited, [first, long], [short, GREEDY])
    usages = [parts[-1].moe for parts in outputs]
    assert usages[0].dropped == 0 < usages[1].dropped
    [alone], [parts] = serve(limited, [first])
    [mixed, _], outputs = serve(limited, [first, long])
    assert outputs[0][-1].moe.dropped == parts[-1].moe.dropped, (
        "the drops of its own prompt, and no more in the same step as the other"
    )
    assert mixed.token_ids == alone.token_ids


def test_binning_leaves_steps_with_prompts_alone():
    binned = engine_on(make_mesh(), MoEConfig(binning=BinningConfig(bin_width=0.01)))
    serve(binned, prompts(6, seed=91))
    stats = binned.moe_stats()
    assert stats["prefill"]["remapped"] == 0 < stats["decode"]["remapped"]
