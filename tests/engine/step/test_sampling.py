"""Tests sampling: its distribution, and its limits in float32 against a float64 oracle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.engine.request import SamplingParams
from jmoe.engine.step.fill import fill_biases, fill_sampling
from jmoe.engine.step.sampling import SamplingRows, blank_rows, sample

VOCAB, DRAWS = 40, 24
TINY = 2.0**-126  # the smallest normal float32
SMALL = [
    5e-324,
    1e-300,
    1e-46,
    1e-45,
    1e-40,
    1e-38,
    1.17e-38,
    TINY,
    1.18e-38,
    1.3e-38,
    3e-38,
    1e-37,
    1e-20,
    1e-6,
]
CASES = [SamplingParams(temperature=t, seed=1) for t in (*SMALL, 0.0, 1.0, 2.0)]
CASES += [SamplingParams(temperature=1.0, top_p=p, seed=1) for p in (0.0, *SMALL, 0.3, 1 - 1e-9, 1.0)]
CASES += [SamplingParams(temperature=1.0, min_p=p, seed=1) for p in (*SMALL, 0.5, 1 - 1e-9, 1.0)]
CASES += [
    SamplingParams(temperature=1.0, top_k=k, seed=1) for k in (-1, 0, 1, VOCAB, 2**31 - 1, 2**31, 2**70)
]
CASES += [
    SamplingParams(temperature=1e-38, top_p=1e-38, min_p=p, top_k=2**31, seed=s)
    for p in (0.0, 1e-45, 1.0)
    for s in (-(2**63), 2**63 - 1)
]
CASES += [
    SamplingParams(temperature=1.0, top_p=1e-45, logit_bias=((3, 100.0), (4, -100.0)), seed=1),
    SamplingParams(temperature=1e-45, logit_bias=((3, 100.0), (5, 100.0)), seed=1),
    SamplingParams(temperature=1.0, min_p=1.0, min_tokens=1, logit_bias=((0, 100.0),), seed=1),
]


def possible(logits: np.ndarray, allowed: np.ndarray, params: SamplingParams) -> set[int]:
    """Returns the tokens that may be drawn, in float64 (whose own underflow is 300 decades below)."""
    x = logits.astype(np.float64)
    for token, bias in params.logit_bias:
        x[token] += bias
    x[0] = -np.inf if params.min_tokens else x[0]
    x[~allowed] = -np.inf
    best = np.flatnonzero(x == x.max())
    with np.errstate(over="ignore"):
        p = np.exp((x - x.max()) / params.temperature) if params.temperature else (x == x.max()).astype(float)
    order = [t for t in np.argsort(-p, kind="stable") if p[t] > 0 and p[t] >= params.min_p * p.max()]
    order = order[: params.top_k if params.top_k > 0 else None]
    share = p[order] / p[order].sum()
    kept = [t for t, before in zip(order, np.cumsum(share) - share, strict=True) if before < params.top_p]
    return {int(t) for t in kept or best}


def drawn(shift: float, masked: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (logits, tokens that a grammar allows, ids ``[case, draw]``) from one compiled call."""
    rng = np.random.default_rng(7)
    logits = (rng.permutation(VOCAB) * 0.5 + shift).astype(np.float32)  # no two are equal
    allowed = np.ones(VOCAB, bool)
    if masked:
        allowed[np.argsort(-logits)[:6]] = False  # the six likeliest tokens
    rows = blank_rows(len(CASES) * DRAWS, VOCAB)
    for i, params in enumerate(CASES):
        for row in range(i * DRAWS, (i + 1) * DRAWS):
            fill_sampling(rows, row, params, position=row)
            fill_biases(rows, row, params, [0], generated=0)
    bits = np.packbits(np.pad(allowed, (0, -VOCAB % 32)), bitorder="little").view(np.uint32)
    rows.has_biases[...] = True
    rows = dataclasses.replace(rows, allowed_BW=np.tile(bits, (len(CASES) * DRAWS, 1)))
    ids = jax.jit(sample)(jnp.tile(logits, (len(CASES) * DRAWS, 1)), rows).ids_B
    return logits, allowed, np.asarray(ids).reshape(len(CASES), DRAWS)


@pytest.mark.parametrize("masked", [False, True], ids=["free", "grammar"])
@pytest.mark.parametrize("shift", [0.0, 80.0, -300.0])
def test_every_accepted_value_behaves_as_its_limit(shift, masked):
    logits, allowed, ids = drawn(shift, masked)
    for params, came_D in zip(CASES, ids, strict=True):
        may, came = possible(logits, allowed, params), set(came_D.tolist())
        assert came <= may and (len(came) > 1 or len(may) <= 4), params


def test_tokens_that_are_equally_likely_all_stay():
    logits = np.full((64, 4), [1.0, 3.0, 3.0, 2.0], np.float32)
    for given in ({"top_p": 1e-45}, {"top_p": 0.0}, {"min_p": 1.0}, {"top_k": 1}, {"temperature": 1.2e-38}):
        rows = blank_rows(64, 4)
        for row in range(64):
            fill_sampling(rows, row, SamplingParams(**{"temperature": 1.0} | given, seed=3), row)
        assert set(np.asarray(sample(jnp.asarray(logits), rows).ids_B).tolist()) == {1, 2}


def rows_of(n: int, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, vocab=8) -> SamplingRows:
    return dataclasses.replace(
        blank_rows(n, vocab),
        temperature_B=np.full(n, temperature, np.float32),
        top_p_B=np.full(n, top_p, np.float32),
        top_k_B=np.full(n, top_k, np.int32),
        min_p_B=np.full(n, min_p, np.float32),
        seed_B=np.arange(n, dtype=np.int32),
    )


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "min_p"),
    [
        (1.0, 1.0, 0, 0),
        (0.7, 1.0, 0, 0),
        (1.0, 1.0, 3, 0),
        (1.0, 0.7, 0, 0),
        (1.5, 0.8, 4, 0),
        (1.0, 1.0, 0, 0.3),
        (0.8, 0.9, 6, 0.2),
        (1.0, 0.6, 0, 0.25),
    ],
)
def test_draws_follow_the_truncated_distribution(temperature, top_p, top_k, min_p):
    logits = np.random.default_rng(0).standard_normal(8).astype(np.float32) * 1.5
    n = 20_000
    drawn = jax.jit(sample)(jnp.tile(logits, (n, 1)), rows_of(n, temperature, top_p, top_k, min_p)).ids_B
    p = np.exp(logits / temperature)
    order = np.argsort(-p)
    keep = order[p[order] >= min_p * p.max()][: top_k or len(p)]
    q = p[keep] / p[keep].sum()
    keep = keep[np.cumsum(q) - q < top_p]
    want = np.zeros(8)
    want[keep] = p[keep] / p[keep].sum()
    got = np.bincount(drawn, minlength=8) / n
    assert not got[want == 0].any()
    np.testing.assert_allclose(got, want, atol=0.015)


def test_temperature_zero_rows_stay_greedy_in_a_sampled_batch():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32))
    mixed = dataclasses.replace(rows_of(6), temperature_B=jnp.array([0.0, 2.0] * 3))
    drawn = sample(logits, mixed).ids_B
    assert drawn[::2].tolist() == logits.argmax(-1)[::2].tolist()
