"""Tests answers whose grammar is asked after a token was drawn: they are those of masks at every step."""

import dataclasses
import itertools

import numpy as np
import pytest
from support.constraints import AlwaysMasked, Counted, RandomSets, Refuses
from support.models.engines import CFG, GREEDY, engine_on, prompts, serve
from support.models.small import mesh_of, tokens

from jmoe import LLM, Grammar
from jmoe.config.moe import MoEConfig
from jmoe.config.techniques import CapacityConfig
from jmoe.engine.engine import Engine
from jmoe.engine.request import Constraint, Output, Request, SamplingParams
from jmoe.mesh import make_mesh

DRAWN = SamplingParams(max_tokens=20, temperature=1.0, seed=5, logprobs=2)
BEST = dataclasses.replace(DRAWN, temperature=0.0)
LONG = dataclasses.replace(GREEDY, max_tokens=20, logprobs=0)
RUNS = itertools.count()


@pytest.fixture(scope="module")
def engine() -> Engine:
    """An engine with too few pages for all requests that may run."""
    return engine_on(make_mesh(), first=4, pages=16)


class Listed:
    """A listener that keeps the tokens it hears of."""

    def __init__(self, engine: Engine):
        self.heard: list[str] = []
        engine.listeners.append(self)

    def token(self, request: Request, now: float) -> None:
        self.heard.append(request.id)

    def finished(self, request: Request, reason: str) -> None: ...

    def stepped(self, report) -> None: ...


def run(engine: Engine, prompts, params, constraints) -> tuple[list[Request], list[list[Output]]]:
    """Serves one request a prompt, each with its constraint, and checks that only its tokens were told. No
    page of an earlier run is used."""
    outputs: list[list[Output]] = [[] for _ in prompts]
    salt = f"run {next(RUNS)}"
    requests = [
        Request(
            str(i),
            list(map(int, p)),
            dataclasses.replace(s, seed=i, cache_salt=salt),
            outputs[i].append,
            0.0,
            constraint=c,
        )
        for i, (p, s, c) in enumerate(zip(prompts, params, constraints, strict=True))
    ]
    listener = Listed(engine)
    engine.run(requests)
    engine.listeners.remove(listener)
    for request, parts in zip(requests, outputs, strict=True):
        assert [t for part in parts for t in part.token_ids] == request.token_ids
        scored = [e.token_id for part in parts for e in part.logprobs]
        assert scored == (request.token_ids if request.params.logprobs is not None else [])
        if request.params.prompt_logprobs is not None:
            assert len(parts[0].prompt_logprobs or ()) == len(request.prompt_token_ids)
            assert not any(part.prompt_logprobs for part in parts[1:])
        assert listener.heard.count(request.id) == len(request.token_ids)
    assert engine.snapshot().kv_usage == 0 and not engine.scheduler.running
    return requests, outputs


def told(outputs: list[list[Output]]) -> list:
    """Returns all that the callers were told, except for numbers."""
    parts = [part for parts in outputs for part in parts]
    return [
        (p.request_id, p.token_ids, p.text, p.finish_reason, p.stop_reason, p.error, p.is_invalid)
        for p in parts
    ]


def logprobs(outputs: list[list[Output]]) -> list[float]:
    return [x for parts in outputs for p in parts for e in p.logprobs for x in (e.logprob, e.top[0][1])]


def both(engine: Engine, many, params, make, oracle: Engine | None = None) -> list[Counted]:
    """Compares answers with masks at every step and answers that are open where the constraint is; returns
    the constraints of the latter.

    make: function that returns the constraint of an answer by its number; None is no constraint.
    """
    wanted = [None if (c := make(i)) is None else AlwaysMasked(c) for i in range(len(many))]
    given = [None if (c := make(i)) is None else Counted(c) for i in range(len(many))]
    masked, want = run(oracle or engine, many, params, wanted)
    open_, got = run(engine, many, params, given)
    assert [r.token_ids for r in open_] == [r.token_ids for r in masked]
    assert told(got) == told(want)
    np.testing.assert_allclose(logprobs(got), logprobs(want), atol=1e-3)
    assert [dataclasses.asdict(r.moe) for r in open_] == [dataclasses.asdict(r.moe) for r in masked]
    for request, constraint in zip(open_, given, strict=True):
        if constraint is not None:
            assert constraint.taken == request.token_ids[: len(constraint.taken)]
            assert len(constraint.taken) >= len(request.token_ids) - 1
    return [c for c in given if c is not None]


def random_sets(i: int) -> Constraint | None:
    return None if i % 3 == 2 else RandomSets(CFG.vocab_size, seed=i)


def short_prompts(count: int, seed: int) -> list[np.ndarray]:
    return [tokens(CFG, 9, seed=seed + i) for i in range(count)]


@pytest.mark.parametrize("params", [DRAWN, BEST], ids=["drawn", "greedy"])
def test_answers_are_those_of_masks_at_every_step(engine: Engine, params: SamplingParams):
    """Some requests lose their pages to others and run again from their tokens."""
    before = engine.snapshot()
    both(engine, prompts(10, seed=100), [params] * 10, random_sets)
    after = engine.snapshot()
    assert after.grammar_redraws > before.grammar_redraws + 10 and after.preemptions > before.preemptions + 1


def test_a_mesh_gives_the_same_answers(engine: Engine):
    on_mesh, many = engine_on(mesh_of((2, 2, 2)), MoEConfig(attention="dp"), first=4), short_prompts(6, 140)
    both(on_mesh, many, [DRAWN] * 6, random_sets, oracle=engine)
    assert on_mesh.snapshot().grammar_redraws > 3


def test_batch_mates_are_undisturbed_to_the_last_bit(engine: Engine):
    """They are decoded in the same steps as positions that are computed again."""
    [prompt, *mates], params = short_prompts(4, 160), dataclasses.replace(LONG, max_tokens=12)
    [free], _ = serve(engine, [prompt], params)
    seen = []
    for refused in ({}, {i: [free.token_ids[i]] for i in (0, 3)}):
        constraints = [Refuses(CFG.vocab_size, refused), None, None, None]
        _, outputs = run(engine, [prompt, *mates], [params] * 4, constraints)
        seen.append([[(p.token_ids, p.logprobs) for p in parts] for parts in outputs[1:]])
    assert seen[0] == seen[1]


def test_lossy_counts_have_each_token_once():
    lossy = engine_on(make_mesh(), MoEConfig(capacity=CapacityConfig(factor=8.0, phase="both")), first=4)
    both(lossy, short_prompts(6, 170), [DRAWN] * 6, random_sets)
    assert lossy.snapshot().grammar_redraws > 3


# ---- refusals at known places ------------------------------------------------------------------------


def refused_at(engine: Engine, prompt, places: list[int], params=LONG) -> Counted:
    """Refuses what the model wants at these places, in a row if they follow one another."""
    refused: dict[int, list[int]] = {}
    for place in places:
        [request], _ = run(engine, [prompt], [params], [AlwaysMasked(Refuses(CFG.vocab_size, refused))])
        refused[place] = [request.token_ids[place]]
    before = engine.snapshot().grammar_redraws
    [constraint] = both(engine, [prompt], [params], lambda i: Refuses(CFG.vocab_size, refused))
    assert 1 <= engine.snapshot().grammar_redraws - before <= len(places)
    return constraint


@pytest.mark.parametrize("length", [1, 8, 16, 33, 44])
def test_the_first_token_of_an_answer_is_drawn_again(engine: Engine, length: int):
    """Prompts end within a page, at its end, after several runs, and are a single token."""
    prompt = tokens(CFG, length, seed=180 + length)
    for params in (LONG, dataclasses.replace(LONG, prompt_logprobs=0)):
        refused_at(engine, prompt, [0], params)


@pytest.mark.parametrize("places", [[19], [0, 1, 2], [6, 7], [3, 5, 9, 10]], ids=str)
def test_refused_tokens_follow_one_another_or_come_last(engine: Engine, places: list[int]):
    """The prompt's seventh token of the answer begins a page. The last place is that of ``max_tokens``."""
    refused_at(engine, tokens(CFG, 10, seed=190), places)


def test_the_context_may_end_with_a_refused_token(engine: Engine):
    endless = dataclasses.replace(LONG, max_tokens=None)
    refused_at(engine, tokens(CFG, 50, seed=191), [13], endless)


def test_masks_are_asked_for_only_after_a_refusal(engine: Engine):
    prompt = tokens(CFG, 6, seed=192)
    [constraint] = both(engine, [prompt], [LONG], lambda i: Refuses(CFG.vocab_size, {}))
    assert constraint.num_masks == 0
    assert refused_at(engine, prompt, [4]).num_masks == 1
    assert refused_at(engine, prompt, [4, 12]).num_masks == 2


def test_open_answers_do_not_wait_for_the_host(engine: Engine, monkeypatch):
    began, got, start = [], [], engine.runner.run

    def counted(given):
        began.append(len(got))
        return start(given)

    monkeypatch.setattr(engine.runner, "run", counted)
    [free], _ = serve(engine, [np.array([5, 6, 7])], GREEDY)
    refused = {3: [free.token_ids[3]]}
    cases = {
        (0, *range(11)): Refuses(CFG.vocab_size, {}),
        tuple(range(12)): AlwaysMasked(Refuses(CFG.vocab_size, {})),
        (0, 0, 1, 2, 3, 3, *range(3, 11)): Refuses(CFG.vocab_size, refused),  # two steps more, and no wait
    }
    for want, constraint in cases.items():
        began.clear()
        got.clear()
        engine.run([Request("ahead", [5, 6, 7], GREEDY, got.append, 0.0, constraint=constraint)])
        assert tuple(began) == want


def test_an_end_token_ends_the_answer_only_where_it_is_allowed(engine: Engine):
    prompt = tokens(CFG, 5, seed=193)
    [free], _ = serve(engine, [prompt], LONG)
    end = free.token_ids[4]
    at = free.token_ids.index(end)
    stops = dataclasses.replace(LONG, stop_token_ids=(end,))
    [ended], _ = run(engine, [prompt], [stops], [Refuses(CFG.vocab_size, {})])
    assert ended.token_ids == free.token_ids[: at + 1]
    both(engine, [prompt], [stops], lambda i: Refuses(CFG.vocab_size, {at: [end]}))
    [later], [parts] = run(engine, [prompt], [stops], [Refuses(CFG.vocab_size, {at: [end]})])
    assert len(later.token_ids) > at + 1 and parts[at].finish_reason is None


@pytest.mark.parametrize("more", range(4))
def test_an_abort_comes_before_during_and_after_a_redraw(engine: Engine, more: int):
    prompt, mate = tokens(CFG, 7, seed=194), tokens(CFG, 12, seed=195)
    [free, quiet], _ = serve(engine, [prompt, mate], LONG)
    constraint, ends, before = Refuses(CFG.vocab_size, {2: [free.token_ids[2]]}), [], engine.scheduler.redraws
    gone = Request("gone", list(map(int, prompt)), LONG, ends.append, 0.0, constraint=constraint)
    stays = Request("stays", list(map(int, mate)), LONG, lambda output: None, 0.0)
    engine.add([gone, stays])
    while engine.scheduler.redraws == before:
        engine.step()
    for _ in range(more):
        engine.step()
    engine.abort("gone")
    told_until = len(ends)
    while engine.busy:
        engine.step()
    assert len(ends) == told_until and ends[-1].finish_reason == "abort"
    assert stays.token_ids == quiet.token_ids and engine.snapshot().kv_usage == 0


class Broken(Refuses):
    """A constraint that cannot say whether a token is allowed."""

    def is_allowed(self, token_id: int) -> bool:
        raise ValueError("the grammar is broken")


def test_a_constraint_that_fails_at_a_drawn_token_ends_its_request_alone(engine: Engine):
    many = [tokens(CFG, 4, seed=196)] * 2
    requests, outputs = run(engine, many, [LONG] * 2, [Broken(CFG.vocab_size, {}), None])
    assert outputs[0][-1].error == "the grammar is broken" and outputs[0][-1].is_invalid
    assert requests[0].token_ids == [] and len(requests[1].token_ids) == 20


def test_a_page_that_others_read_is_copied_before_its_last_token_is_computed_again(
    engine: Engine, monkeypatch
):
    """One prompt is the beginning of the other; its last token ends a page."""
    long = tokens(CFG, 40, seed=197)
    short = long[:16]
    [free], _ = serve(engine, [short], LONG)
    [alone], _ = serve(engine, [long], LONG)
    copies, shared = [], engine_on(make_mesh(), first=4)
    copy = shared.runner.copy_pages

    def counted(*given: np.ndarray) -> None:
        copies.append(given)
        copy(*given)

    monkeypatch.setattr(shared.runner, "copy_pages", counted)
    refuses = Refuses(CFG.vocab_size, {0: [free.token_ids[0]]})
    requests, _ = run(shared, [short, long], [LONG] * 2, [refuses, None])
    assert requests[1].num_cached_tokens == 16 and len(copies) == 1
    assert requests[1].token_ids == alone.token_ids


# ---- grammars ----------------------------------------------------------------------------------------

CALLS = """
start: (text_then_open "{\\"a\\": " args "}")* rest
text_then_open[lazy]: TEXT "TRIGGER"
rest: TEXT
TEXT: /(.|\\n)*/
args: %json {"type": "object", "properties": {"n": {"type": "integer"}, "w": {"enum": ["x", "yes"]}},
"required": ["n"], "additionalProperties": false}
"""
GRAMMARS = {
    "a word": Grammar("lark", CALLS.replace("TRIGGER", " the")),
    "a comma": Grammar("lark", CALLS.replace("TRIGGER", ", ")),
    "in a word": Grammar("lark", CALLS.replace("TRIGGER", "em")),
    "free text": Grammar("lark", "start: /(.|\\n)*/\n"),
    "digits": Grammar("regex", "[0-9]+"),
    "letters": Grammar("regex", "[a-z ,.]+"),
    "an object": Grammar("json_schema", '{"properties": {"a": {"enum": ["x", "yes"]}}, "required": ["a"]}'),
}
TEXTS = ["Once upon a time", "The", "def f(x):\n", "1 2 3"]


@pytest.fixture(scope="module")
def llm():
    with LLM("tiny", dtype="float32", max_num_seqs=4, max_model_len=128, warm_up=False) as llm:
        yield llm


@pytest.mark.parametrize("name", GRAMMARS)
def test_text_with_calls_is_that_of_masks_at_every_step(llm: LLM, name: str):
    compiled = llm._grammars.compile(GRAMMARS[name])
    params = [dataclasses.replace(DRAWN, max_tokens=40, temperature=t) for t in (0.0, 0.9)] * 2
    constraints = both(llm.engine, [llm.encode(t) for t in TEXTS], params, lambda i: compiled.constraint())
    masks, drawn = (sum(n) for n in zip(*((c.num_masks, len(c.taken)) for c in constraints), strict=True))
    if name == "free text":
        assert masks == 0
    elif name in ("a word", "a comma", "in a word"):
        assert masks < drawn / 2


def test_end_tokens_that_are_ignored_close_nothing(llm: LLM):
    """After its end a grammar allows end tokens alone, so every later step would need a mask."""
    end = min(llm.engine.end_ids)
    params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True, logit_bias=((end, 9.0),))
    free, constraint = (
        serve(llm.engine, [llm.encode("The")], params)[0][0],
        Counted(llm._grammars.compile(GRAMMARS["free text"]).constraint()),
    )
    [request], _ = run(llm.engine, [llm.encode("The")], [params], [constraint])
    assert end in request.token_ids and request.token_ids == free.token_ids
    assert constraint.num_masks == 0 and {*request.token_ids} - {end, *constraint.taken} == set()
