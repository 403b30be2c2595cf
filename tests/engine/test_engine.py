"""Tests the answers of the engine on a small random model: alone, in a batch and on every mesh."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models.engines import CFG, GREEDY, engine_of, engine_on, prompts, serve
from support.models.small import decoder, mesh_of, tokens
from tokenizers import Tokenizer, models

from jmoe.config.moe import MoEConfig
from jmoe.engine.engine import Engine
from jmoe.engine.request import Output, Request, SamplingParams
from jmoe.engine.step.inputs import Sizes
from jmoe.engine.step.runner import CompilationCounter
from jmoe.engine.text.token_bytes import TokenBytes
from jmoe.mesh import make_mesh
from jmoe.models.decoder import Decoder


@pytest.fixture(scope="module")
def engine() -> Engine:
    return engine_on(make_mesh(), warm_up=True)


def window_logits(engine: Engine, ids) -> np.ndarray:
    ids = np.asarray(ids, np.int32)[None]
    return engine.runner.window_logits(ids, np.arange(ids.shape[1], dtype=np.int32)[None])[0]


def test_greedy_is_the_argmax_of_a_full_forward(engine: Engine):
    """Prompts are shorter than a run, longer than the longest run (several runs), and at page edges."""
    for length in (1, 8, 31, 32, 33, 50):
        prompt = tokens(CFG, length, seed=length)
        [request], [parts] = serve(engine, [prompt])
        full = [*prompt, *request.token_ids]
        logits = window_logits(engine, full)
        assert request.token_ids == logits[length - 1 : -1].argmax(-1).tolist()
        assert [t for p in parts for t in p.token_ids] == request.token_ids
        assert parts[-1].finish_reason == "length" and all(p.finish_reason is None for p in parts[:-1])


@pytest.mark.parametrize(
    ("decode", "mixed"),
    [
        ((4,), (4,)),
        ((1, 4, 8), (8,)),
        ((1, 4, 8, 16, 20), (4, 20)),
        ((1, 4, 8, 16, 32), (8, 32)),
        ((1, 4, 8, 16, 32, 64, 128, 256), (4, 16, 64, 256)),
    ],
)
def test_few_sizes_compile_for_steps_with_prompts(decode: tuple[int, ...], mixed: tuple[int, ...]):
    sizes = Sizes(decode, (32,), 8, 40, 8)
    assert sizes.mixed_decode == mixed
    assert [sizes.mixed_decode_size(runs) for runs in (1, mixed[-1])] == [mixed[0], mixed[-1]]


def test_a_prompt_that_is_nearly_alone_has_few_decode_rows(engine: Engine, monkeypatch):
    """One prompt comes, then sixteen at once; the last of these run in steps that also decode the first."""
    wide, seen = engine_on(make_mesh(), seats=16, first=4), []
    run = wide.runner.run

    def recorded(given):
        if given.decode_rows is not None:
            seen.append(len(given.decode_rows.seats_B))
        return run(given)

    monkeypatch.setattr(wide.runner, "run", recorded)
    for many in ([tokens(CFG, 20, seed=5)], prompts(16, seed=40)):
        seen.clear()
        assert [r.token_ids for r in serve(wide, many)[0]] == [r.token_ids for r in serve(engine, many)[0]]
        assert set(seen) <= {4, 16} and max(seen) == (4 if len(many) == 1 else 16)


def test_company_changes_nothing(engine: Engine):
    many = prompts(11)
    together = [r.token_ids for r in serve(engine, many)[0]]
    alone = [serve(engine, [p])[0][0].token_ids for p in many]
    assert together == alone
    assert engine.scheduler.pool.usage == 0


@pytest.mark.parametrize(
    ("shape", "attention", "transport"),
    [
        ((2, 2, 2), "dp", "all_to_all"),
        ((1, 8, 1), "tp", "ragged_all_to_all"),
        pytest.param((1, 8, 1), "dp", "replicated", marks=pytest.mark.matrix),
        pytest.param((2, 2, 2), "tp", "replicated", marks=pytest.mark.matrix),
    ],
    ids=str,
)
def test_a_mesh_generates_the_same_tokens(engine: Engine, shape, attention: str, transport: str):
    many = prompts(9)
    moe = MoEConfig(attention=attention, transport=transport)
    seats = 8 if attention == "tp" else 4
    on_mesh = engine_on(mesh_of(shape), moe, seats=seats, first=shape[1], warm_up=True)
    want, got = ([r.token_ids for r in serve(e, many)[0]] for e in (engine, on_mesh))
    assert got == want
    assert on_mesh.runner.compilations.num_after_warmup == 0
    on_mesh.close()


def test_nothing_compiles_after_warm_up(engine: Engine):
    mixed = [
        GREEDY,
        SamplingParams(max_tokens=5, temperature=0.8, seed=1),
        SamplingParams(max_tokens=7, temperature=1.0, top_k=3, top_p=0.9, seed=2),
        SamplingParams(max_tokens=3, temperature=0.0, logprobs=4, prompt_logprobs=2),
        SamplingParams(max_tokens=4, min_tokens=2, stop_token_ids=(3,), seed=5),
    ]
    before = engine.runner.compilations.num_after_warmup
    serve(engine, prompts(5, seed=7), mixed)
    engine.moe_stats()
    assert engine.runner.compilations.num_after_warmup == before
    jax.jit(lambda x: x * 3 + 1)(jnp.ones(17))
    window_logits(engine, range(11))
    assert engine.runner.compilations.num_after_warmup == before, "only the engine's own steps count"
    engine.runner.run(engine.runner.blank("decode", 3, 1))
    assert engine.runner.compilations.num_after_warmup > before, "the counter hears a shape that was not warm"


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_a_second_engine_of_the_same_shapes_compiles_nothing(shape):
    mesh = mesh_of(shape)
    models = [decoder(CFG, mesh, seed=seed) for seed in (1, 2)]
    compiled: list[str] = []

    def heard(event: str, seconds: float, **more: str | int) -> None:
        compiled.append(event)

    def tokens_of(model: Decoder) -> list[int]:
        engine = engine_of(model, mesh, warm_up=True)
        [request], _ = serve(engine, [tokens(CFG, 40)], dataclasses.replace(GREEDY, prompt_logprobs=1))
        if mesh.size == 1:
            window_logits(engine, range(16))
        engine.close()
        return request.token_ids

    first = tokens_of(models[0])
    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        second = tokens_of(models[1])
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
    assert CompilationCounter.EVENT not in compiled
    assert first != second, "the second engine runs its own weights"


def test_logprobs_are_those_of_a_full_forward(engine: Engine):
    prompt = tokens(CFG, 37, seed=3)
    params = dataclasses.replace(GREEDY, max_tokens=4, logprobs=3, prompt_logprobs=2)
    [request], [parts] = serve(engine, [prompt], params)
    logits = window_logits(engine, [*prompt, *request.token_ids])
    want = np.asarray(jax.nn.log_softmax(logits))
    scored = parts[0].prompt_logprobs
    assert scored[0] is None and len(scored) == len(prompt)
    for i, entry in enumerate(scored[1:], 1):
        assert entry.token_id == prompt[i]
        assert entry.logprob == pytest.approx(want[i - 1, prompt[i]], abs=1e-4)
        best = np.argsort(-want[i - 1], kind="stable")[:2].tolist()
        assert [t for t, _ in entry.top][:2] == best and (entry.token_id, entry.logprob) in entry.top
    for i, entry in enumerate(e for p in parts for e in p.logprobs):
        at = len(prompt) - 1 + i
        assert entry.logprob == pytest.approx(want[at, request.token_ids[i]], abs=1e-4)
        assert len(entry.top) == 3


def test_max_tokens_zero_scores_the_prompt(engine: Engine):
    [request], [parts] = serve(engine, [tokens(CFG, 9)], SamplingParams(max_tokens=0, prompt_logprobs=0))
    assert request.token_ids == [] and len(parts) == 1
    assert parts[0].finish_reason == "length" and len(parts[0].prompt_logprobs) == 9


def test_end_and_stop_tokens(engine: Engine):
    prompt = tokens(CFG, 5, seed=1)
    free = serve(engine, [prompt])[0][0].token_ids
    third = free[2]
    first_at = free.index(third)
    [request], [parts] = serve(engine, [prompt], dataclasses.replace(GREEDY, stop_token_ids=(third,)))
    assert request.token_ids == free[: first_at + 1]
    assert (parts[-1].finish_reason, parts[-1].stop_reason) == ("stop", third)
    held = dataclasses.replace(GREEDY, stop_token_ids=(third,), min_tokens=8)
    assert third not in serve(engine, [prompt], held)[0][0].token_ids[:8]


def test_a_seed_draws_the_same_in_any_company(engine: Engine):
    params = SamplingParams(max_tokens=10, temperature=1.0, top_p=0.95, seed=42)
    prompt = tokens(CFG, 6)
    alone = serve(engine, [prompt], params)[0][0].token_ids
    crowd = serve(engine, [prompt, *prompts(3)], [params, *[dataclasses.replace(params, seed=9)] * 3])[0][
        0
    ].token_ids
    other = serve(engine, [prompt], dataclasses.replace(params, seed=43))[0][0].token_ids
    assert alone == crowd != other


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], GREEDY, "the prompt is empty"),
        ([96], GREEDY, "token id 96 is outside the vocabulary of 96"),
        ([-1], GREEDY, "token id -1 is outside"),
        (
            [1] * 60,
            GREEDY,
            r"maximum context length is 64 tokens. However, you requested 72 tokens \(60 in the",
        ),
        (
            [1] * 64,
            dataclasses.replace(GREEDY, max_tokens=None),
            r"requested 65 tokens \(64 in the prompt, 1 to",
        ),
        ([1], dataclasses.replace(GREEDY, stop=("x",)), "stop strings need a tokenizer"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(engine: Engine, prompt, params, message):
    with pytest.raises(ValueError, match=message):
        serve(engine, [prompt], params)
    assert not engine.scheduler.running and not engine.scheduler.waiting


def test_a_request_larger_than_the_pool_is_refused():
    small = engine_on(make_mesh(), pages=3)
    with pytest.raises(ValueError, match="needs 6 KV pages and there are 3"):
        serve(small, [[1] * 30])
    assert serve(small, [[1] * 5])[1][0][-1].finish_reason == "length"
    small.close()


def test_abort_frees_slot_and_pages(engine: Engine):
    ends: list[Output] = []
    request = Request("gone", [1, 2, 3], GREEDY, ends.append, 0.0)
    engine.add([request])
    engine.step(), engine.step()
    engine.abort("gone")
    engine.abort("gone")
    assert ends[-1].finish_reason == "abort" and sum(o.finish_reason is not None for o in ends) == 1
    assert engine.scheduler.pool.usage == 0 and not engine.scheduler.running


def test_nan_logits_end_the_request_with_an_error(engine: Engine):
    weights = engine.runner.weights
    engine.runner.weights = [jnp.full_like(w, jnp.nan) if w.dtype == jnp.float32 else w for w in weights]
    try:
        _, [parts] = serve(engine, [[1, 2]])
    finally:
        engine.runner.weights = weights
    assert parts[-1].finish_reason == "error" and "NaN" in parts[-1].error


def test_counts_are_every_token_times_k(engine: Engine):
    before = engine.moe_stats()
    serve(engine, [tokens(CFG, 20, seed=99)], dataclasses.replace(GREEDY, max_tokens=6))
    after = engine.moe_stats()
    new = {p: np.array(after[p]["counts"]) - np.array(before[p]["counts"]) for p in ("prefill", "decode")}
    assert (new["prefill"].sum(1) == 20 * 2).all() and (new["decode"].sum(1) == 5 * 2).all()


class Panics(TokenBytes):
    """A constraint that fails on one token, as a decoder does that panics."""

    bad = -1

    def __call__(self, id: int) -> bytes:
        if id == self.bad:
            raise ValueError("the tokenizer cannot decode a token: index out of bounds")
        return b"x"


def test_a_tokenizer_that_fails_ends_the_request_whose_token_it_was(engine):
    pair = prompts(2, seed=11)
    (first, second), _ = serve(engine, pair)
    token_bytes = Panics(Tokenizer(models.BPE({}, [])))
    token_bytes.bad = next(t for t in first.token_ids if t not in (*second.token_ids, *pair[0], *pair[1]))
    engine.codec = SimpleNamespace(token_bytes=token_bytes)
    try:
        (failed, whole), outputs = serve(engine, pair)
        with pytest.raises(ValueError, match="index out of bounds"):
            engine.add([Request("x", [token_bytes.bad], GREEDY, lambda output: None, 0.0)])
        assert not engine.busy, "one that cannot begin is not queued"
    finally:
        engine.codec = None
    assert outputs[0][-1].finish_reason == "error" and "index out of bounds" in outputs[0][-1].error
    assert len(failed.token_ids) <= len(first.token_ids) and whole.token_ids == second.token_ids
    assert "".join(output.text for output in outputs[1]) == "x" * len(second.token_ids)
