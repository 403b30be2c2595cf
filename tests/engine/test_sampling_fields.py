"""Tests penalties and limits on tokens in the engine: every token beside logits of the whole sequence."""

import dataclasses

import numpy as np
import pytest
from support.models.engines import CFG, GREEDY, engine_on, prompts, serve
from support.models.small import mesh_of, tokens
from support.oracles.penalties import restated

from jmoe.engine.engine import Engine
from jmoe.engine.request import SamplingParams, TokenLimits
from jmoe.mesh import make_mesh

LENGTH = 64
PENALTIES = [
    dataclasses.replace(GREEDY, repetition_penalty=1.8),
    dataclasses.replace(GREEDY, frequency_penalty=2.0, presence_penalty=-0.5),
    dataclasses.replace(GREEDY, presence_penalty=2.0, repetition_penalty=0.6),
    dataclasses.replace(GREEDY, frequency_penalty=-2.0),
]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return engine_on(make_mesh(), warm_up=True)


def best(engine: Engine, prompt: list[int], answer: list[int], params: SamplingParams) -> list[int]:
    """Returns the likeliest token after each beginning of the answer."""
    ids, positions = np.zeros((engine.runner.ranks, LENGTH), np.int32), np.arange(LENGTH, dtype=np.int32)
    ids[0, : len(prompt) + len(answer)] = [*prompt, *answer]
    logits = engine.runner.window_logits(ids, np.tile(positions, (engine.runner.ranks, 1)))[0]
    rows = [logits[len(prompt) - 1 + i] for i in range(len(answer))]
    return [int(restated(row, prompt, answer[:i], params).argmax()) for i, row in enumerate(rows)]


def check(engine: Engine, oracle: Engine, many, params: list[SamplingParams]) -> None:
    """Serves all at once and compares every token; the requests without penalties are their batch mates."""
    requests, _ = serve(engine, many, params)
    for request in requests:
        want = best(oracle, request.prompt_token_ids, request.token_ids, request.params)
        assert request.token_ids == want, request.params


def mixed() -> tuple[list, list[SamplingParams]]:
    many = [prompt[:40] for prompt in prompts(8, seed=51)]
    return many, [*PENALTIES, GREEDY, GREEDY, *PENALTIES[:2]]


def test_every_token_is_the_likeliest_after_penalties(engine: Engine):
    """There are more requests than seats, so that seats hold counts of those before; prompts come again."""
    many, params = mixed()
    free = [r.token_ids for r in serve(engine, many)[0]]
    check(engine, engine, many, params)
    hits = engine.snapshot().prefix_hits
    check(engine, engine, many, params[::-1])
    assert engine.snapshot().prefix_hits > hits, "the second time their prompts are in the cache"
    assert [r.token_ids for r in serve(engine, many)[0]] == free
    penalised, _ = serve(engine, many, params)
    assert penalised[0].token_ids != free[0]
    assert engine.runner.compilations.num_after_warmup == 0


def test_requests_that_give_way_keep_their_penalties(engine: Engine):
    tight = engine_on(make_mesh(), pages=9)
    check(tight, engine, *mixed())
    assert tight.snapshot().preemptions > 0


def test_penalties_on_a_mesh(engine: Engine):
    check(engine_on(mesh_of((2, 2, 2)), first=2), engine, *mixed())


def test_allowed_tokens_and_bad_words_hold_one_step_ahead(engine: Engine, monkeypatch):
    prompt = tokens(CFG, 9, seed=7)
    free = serve(engine, [prompt])[0][0].token_ids
    some = tuple(sorted({*range(0, 96, 3)}))
    drawn = SamplingParams(max_tokens=12, temperature=1.0, seed=5, allowed_token_ids=some)
    both, _ = serve(engine, [prompt, prompt], [drawn, GREEDY])
    assert {*both[0].token_ids} <= {*some} and both[1].token_ids == free
    pair, triple = tuple(free[2:4]), tuple(free[4:7])
    limits = TokenLimits(None, (pair, triple))
    monkeypatch.setattr(engine, "_limits", lambda allowed, bad: limits if bad else None)
    bad = dataclasses.replace(GREEDY, bad_words=("x",))
    requests, _ = serve(engine, [prompt, prompt], [bad, GREEDY])
    answer = requests[0].token_ids
    assert answer[:3] == free[:3] and answer[3] != free[3] and requests[1].token_ids == free
    found = [answer[i : i + n] for n in (2, 3) for i in range(len(answer))]
    assert [*pair] not in found and [*triple] not in found


def test_ranks_of_a_prompt_count_the_likelier_tokens(engine: Engine):
    prompt = tokens(CFG, 20, seed=9).tolist()
    _, [parts] = serve(engine, [prompt], dataclasses.replace(GREEDY, prompt_logprobs=2))
    ids = np.zeros((1, LENGTH), np.int32)
    ids[0, :20] = prompt
    logits = engine.runner.window_logits(ids, np.arange(LENGTH, dtype=np.int32)[None])[0]
    want = [int((logits[i] >= logits[i, prompt[i + 1]]).sum()) for i in range(19)]
    assert [entry.rank for entry in parts[0].prompt_logprobs[1:]] == want and len(set(want)) > 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"allowed_token_ids": (96,)}, "allowed_token_ids: 96 is outside the vocabulary of 96"),
        ({"bad_words": ("x",)}, "bad_words need a tokenizer, which this model directory does not have"),
    ],
)
def test_limits_that_cannot_be_kept_are_refused(engine: Engine, fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        serve(engine, [[1, 2]], dataclasses.replace(GREEDY, **fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"frequency_penalty": 2.1},
        {"presence_penalty": -2.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("nan")},
        {"allowed_token_ids": ()},
        {"bad_words": (" ",)},
    ],
    ids=str,
)
def test_values_outside_of_their_limits_are_refused_by_name(fields: dict):
    with pytest.raises(ValueError, match=f"^{next(iter(fields))} "):
        SamplingParams(**fields)
