"""Tests penalties and limits on tokens against a restatement in numpy, and against transformers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.oracles.penalties import restated

from jmoe.engine.request import Request, SamplingParams, TokenLimits
from jmoe.engine.schedule.plan import Run
from jmoe.engine.step.fill import fill_biases, fill_limits, fill_penalties
from jmoe.engine.step.penalties import (
    MOST,
    Seats,
    count_last,
    counts_of,
    make_counts,
    new_counts,
    penalize,
    replace_counts,
)
from jmoe.engine.step.sampling import blank_rows, sample

VOCAB, SEATS = 32, 4
ids = st.lists(st.integers(0, VOCAB - 1), max_size=40)
LATEST = jnp.zeros(SEATS, jnp.int32)
COUNT = jax.jit(count_last)
PENALIZE = jax.jit(lambda logits, counts, seats, given: penalize(logits, Seats(LATEST, counts, seats), given))


@given(
    rows=st.lists(
        st.tuples(ids, ids, st.floats(0.5, 2), st.floats(-2, 2), st.floats(-2, 2)),
        min_size=SEATS,
        max_size=SEATS,
    ),
    entered=st.lists(st.integers(0, 40), min_size=SEATS, max_size=SEATS),
    order=st.permutations(range(SEATS)),
    seed=st.integers(0, 99),
)
def test_penalties_are_those_of_the_formula(rows, entered, order, seed):
    """The seats held other requests. Each answer enters with some tokens, and the others are drawn later."""
    rng = np.random.default_rng(seed)
    counts = jnp.asarray(rng.integers(0, 1 << 15, (SEATS, VOCAB)).astype(np.int16))
    for seat, (prompt, answer, *_), at in zip(order, rows, entered, strict=True):
        counts = replace_counts(counts, jnp.int32(seat), counts_of(prompt, answer[:at], VOCAB))
    for i in range(40):
        is_counted = np.array([at <= i < len(row[1]) for row, at in zip(rows, entered, strict=True)])
        last = np.array([row[1][i] if i < len(row[1]) else 0 for row in rows], np.int32)
        counts = COUNT(counts, np.array(order, np.int32), last, is_counted)
    logits = rng.normal(size=(SEATS, VOCAB)).astype(np.float32) * 4
    given = np.array([row[2:] for row in rows], np.float32)
    got = np.asarray(PENALIZE(logits, counts, np.array(order, np.int32), given))
    for i, (prompt, answer, *_) in enumerate(rows):
        r, f, p = (float(x) for x in given[i])
        params = SamplingParams(repetition_penalty=r, frequency_penalty=f, presence_penalty=p)
        np.testing.assert_allclose(got[i], restated(logits[i], prompt, answer, params), rtol=1e-5, atol=1e-5)


def test_a_row_without_penalties_keeps_every_bit():
    rng = np.random.default_rng(0)
    counts = jnp.asarray(rng.integers(0, 1 << 15, (SEATS, VOCAB)).astype(np.int16))
    logits = rng.normal(size=(SEATS, VOCAB)).astype(np.float32)
    logits[:, 3], logits[:, 4] = -np.inf, -0.0
    off = np.tile(np.array([1.0, 0.0, 0.0], np.float32), (SEATS, 1))
    off[1] = 1.5, 1.0, 1.0
    got = np.asarray(PENALIZE(logits, counts, np.arange(SEATS, dtype=np.int32), off))
    kept = [0, 2, 3]
    assert got[kept].tobytes() == logits[kept].tobytes() and not np.array_equal(got[1], logits[1])


def test_extremes_stay_finite_and_forbidden_tokens_stay_forbidden():
    counts = jnp.asarray(counts_of([0, 1, 2], [], VOCAB))[None]
    logits = np.full((1, VOCAB), -1.0, np.float32)
    logits[0, :3] = 5.0, -5.0, -np.inf
    for r in (2.0**-126, 2.0**127):
        got = np.asarray(PENALIZE(logits, counts, np.zeros(1, np.int32), np.array([[r, 0, 0]], np.float32)))
        assert np.isfinite(got[0, :2]).all() and got[0, 2] == -np.inf


def test_a_count_stops_at_its_limit_and_a_number_past_the_seats_counts_nothing():
    counts = jnp.asarray(np.stack([counts_of([5], [5] * (MOST + 9), VOCAB), counts_of([5], [], VOCAB)]))
    seats, is_counted = np.array([0, 1, 7], np.int32), np.ones(3, bool)
    after = np.asarray(COUNT(counts, seats, np.full(3, 5, np.int32), is_counted))
    assert after[0, 5] == counts[0, 5] > 0, "neither the bit of the prompt nor the sign is touched"
    assert after[1, 5] == counts[1, 5] + 1 and (after != counts).sum() == 1


def run(request: Request, start: int, count: int = 1) -> Run:
    return Run(request, start, count, is_decode=start > 0, is_sampled=True)


def request_of(prompt: list[int], answer: list[int], **given) -> Request:
    params = SamplingParams(max_tokens=9, **given)
    return Request("r", prompt, params, lambda output: None, 0.0, token_ids=answer)


def test_a_position_that_runs_again_counts_each_token_once():
    """A token that is thrown away was counted by the step after it; so the seat gets a whole new row."""
    request = request_of([1, 2], [], presence_penalty=1.0)
    counts = make_counts(1, VOCAB)

    def step(start: int, latest: int) -> np.ndarray:
        nonlocal counts
        rows, one = blank_rows(1, VOCAB), run(request, start, 2 if start == 0 else 1)
        fill_penalties(rows, 0, one)
        if (row_V := new_counts(one, VOCAB)) is not None:
            counts = replace_counts(counts, jnp.int32(0), row_V)
        last = np.where(rows.last_B < 0, latest, rows.last_B).astype(np.int32)
        counts = COUNT(counts, np.zeros(1, np.int32), last, rows.is_counted_B)
        return np.asarray(counts[0])

    step(0, -9)
    step(2, 7)  # 7 is on the device only
    request.token_ids = [7]
    step(3, 8)
    assert request.state.num_counted_tokens == 4
    request.token_ids = [7]  # 8 was refused, and its position runs again
    assert step(2, 8).tolist() == counts_of([1, 2], [7], VOCAB).tolist()
    assert step(3, 9).tolist() == counts_of([1, 2], [7, 9], VOCAB).tolist()
    other = request_of([1, 2], [7, 9])
    assert new_counts(run(other, 3), VOCAB) is None, "a request without penalties counts nothing"


def banned_after(sequences, answer: list[int], known: int, latest: int) -> set[int]:
    """Returns the tokens that a step forbids, from one sample of equal logits for each token."""
    request = request_of([1], answer[:known])
    request.limits = TokenLimits(None, sequences)
    rows = blank_rows(VOCAB, VOCAB)
    for row in range(VOCAB):
        fill_limits(rows, row, request, len(answer))
    seats = Seats(LATEST.at[2].set(latest), make_counts(SEATS, VOCAB), np.full(VOCAB, 2, np.int32))
    drawn = jax.jit(sample)(jnp.eye(VOCAB, dtype=jnp.float32), rows, seats).ids_B
    return {token for token, id in enumerate(np.asarray(drawn)) if id != token}


@pytest.mark.parametrize("is_seen", [True, False], ids=["on the host", "on the device"])
def test_a_bad_word_is_never_completed(is_seen: bool):
    sequences = ((5, 6), (4, 5, 7), (3, 4, 5, 8), (4, 4, 9), (5, 10), (5, 6, 11))
    for answer, want in (
        ([], set()),
        ([4], set()),
        ([5], {6, 10}),
        ([4, 5], {6, 7, 10}),
        ([3, 4, 5], {6, 7, 8, 10}),
        ([4, 3, 5], {6, 10}),
        ([4, 4], {9}),
        ([4, 5, 6], {11}),
    ):
        known = len(answer) if is_seen or not answer else len(answer) - 1
        assert banned_after(sequences, answer, known, (answer or [0])[-1]) == want, answer


def test_the_order_is_that_of_vllm():
    """Masks and end tokens stay forbidden; a bias is added before the repetition penalty."""
    rows, request = blank_rows(1, VOCAB), request_of([3, 4], [], repetition_penalty=2.0, presence_penalty=1.0)
    params = dataclasses.replace(request.params, logit_bias=((3, 6.0), (0, 50.0)), min_tokens=1)
    request.params = params
    fill_biases(rows, 0, params, [0], generated=0)
    fill_penalties(rows, 0, run(request, 0, 2))
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, 9], logits[0, 10] = 3.5, 2.5  # (0 + 6) / 2 = 3 is between
    for forbidden, want in (((), 9), ((9,), 3), ((9, 3), 10)):
        mask = np.full(VOCAB, True)
        mask[[*forbidden]] = False
        rows.allowed_BW[:] = np.packbits(mask, bitorder="little").view(np.uint32)
        rows.has_biases[...] = True
        seen = Seats(LATEST, jnp.asarray(counts_of([3, 4], [], VOCAB))[None], np.zeros(1, np.int32))
        assert int(sample(jnp.asarray(logits), rows, seen).ids_B[0]) == want


@pytest.mark.parity
@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.3])
def test_the_repetition_penalty_is_transformers_bit_for_bit(penalty: float):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(1, VOCAB)).astype(np.float32) * 4
    prompt, answer = rng.integers(0, VOCAB, 9).tolist(), rng.integers(0, VOCAB, 9).tolist()
    processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    want = processor(torch.tensor([prompt + answer]), torch.tensor(logits.copy())).numpy()
    given = np.array([[penalty, 0, 0]], np.float32)
    counts = jnp.asarray(counts_of(prompt, answer, VOCAB))[None]
    assert np.asarray(PENALIZE(logits, counts, np.zeros(1, np.int32), given)).tobytes() == want.tobytes()
