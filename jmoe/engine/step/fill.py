"""Turns the scheduler's plan into a step's host arrays: where each run goes, and what its rows hold."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jmoe.engine.request import Request, SamplingParams, TokenLimits
from jmoe.engine.schedule.plan import Run, Step
from jmoe.engine.step.inputs import HostRows, StepInput
from jmoe.engine.step.penalties import continues
from jmoe.engine.step.runner import Runner
from jmoe.engine.step.sampling import SamplingRows

SMALLEST = float(np.finfo(np.float32).tiny)  # some devices treat smaller numbers as 0, others do not
LARGEST_COUNT = np.iinfo(np.int32).max


class PlacedRun(NamedTuple):
    """A run and its place in a step's arrays.

    sample_row: index of the run's sampled token in the arrays ``[B]`` of ``StepInput``.
    arrays: host arrays that hold the run.
    rows: slice of the run's rows in them.
    change_rows: the same rows among all rows of the step, decode rows first.
    rank: row of the grid that holds the run's first token.
    column: column of that token in the grid.
    """

    run: Run
    sample_row: int
    arrays: HostRows
    rows: slice
    change_rows: slice
    rank: int
    column: int


def place_runs(step: Step, runner: Runner) -> tuple[list[PlacedRun], StepInput]:
    """Returns where each run goes, and the step's host arrays, which hold only padding so far.

    Each run of a rank takes one row of the sampled tokens, so a rank has no more runs than such rows.
    """
    decodes, prompts = (by_rank(runs, runner.ranks) for runs in (step.decodes, step.prompts))
    length, rows = runner.sizes.row_tokens, step.prompt_size // runner.sizes.row_tokens
    if step.prompt_size:
        most = max(len(d) + len(p) for d, p in zip(decodes, prompts, strict=True))
        b = runner.sizes.mixed_decode_size(most)
        inputs = runner.blank("prefill", rows, length, b)
    else:
        b = runner.sizes.decode_size(max(map(len, decodes)))
        inputs = runner.blank("decode", b, 1)
    placed = []
    for rank in range(runner.ranks):
        for i, run in enumerate(decodes[rank]):
            row = rank * b + i
            own_row = slice(row, row + 1)
            arrays = inputs.decode_rows or inputs.main_rows
            placed.append(PlacedRun(run, row, arrays, own_row, own_row, rank, i))
        first = 0  # of the rank's rows
        for i, run in enumerate(prompts[rank], len(decodes[rank])):
            count = -(-run.count // length)
            own_rows = slice(rank * rows + first, rank * rows + first + count)
            change_rows = slice(runner.ranks * b + own_rows.start, runner.ranks * b + own_rows.stop)
            where = inputs.main_rows, own_rows, change_rows, rank, b + first * length
            placed.append(PlacedRun(run, rank * b + i, *where))
            first += count
    return placed, inputs


def by_rank(runs: list[Run], ranks: int) -> list[list[Run]]:
    found: list[list[Run]] = [[] for _ in range(ranks)]
    for run in runs:
        found[run.request.state.rank].append(run)
    return found


def fill(placed: PlacedRun, inputs: StepInput, ends: Sequence[int]) -> None:
    """Writes the rows of one run. A token that only the device knows is -1.

    ends: tokens that end an answer.
    """
    run, row, arrays, rows = placed.run, placed.sample_row, placed.arrays, placed.rows
    request, start, count, state = run.request, run.start, run.count, run.request.state
    # the rows of one run follow one another
    arrays.tokens_BT[rows].reshape(-1)[:count] = request.part(start, count) or [-1]
    arrays.positions_BT[rows].reshape(-1)[:count] = np.arange(start, start + count)
    arrays.table_BM[rows, : len(state.block_table)] = state.block_table
    arrays.exact_B[rows], arrays.seats_B[rows] = request.params.exact, state.seat
    arrays.fresh_B[rows.start] = start == state.num_cached_tokens
    inputs.logit_columns_B[row], inputs.seats_B[row] = placed.column + count - 1, state.seat
    sampling_rows = inputs.sampling_rows
    fill_sampling(sampling_rows, row, request.params, start + count)
    generated = start + count - len(request.prompt_token_ids)
    fill_biases(sampling_rows, row, request.params, ends, generated)
    if run.is_sampled and request.params.has_penalties:
        fill_penalties(sampling_rows, row, run)
    if run.is_sampled and request.limits is not None:
        fill_limits(sampling_rows, row, request, generated)


def fill_sampling(rows: SamplingRows, row: int, params: SamplingParams, position: int) -> None:
    """Writes a row's sampling parameters; values that the arrays cannot hold become the nearest limit.

    position: position of the token to be sampled.
    """
    rows.temperature_B[row] = params.temperature if params.temperature >= SMALLEST else 0
    rows.top_p_B[row] = params.top_p if params.top_p >= SMALLEST else 0
    rows.min_p_B[row] = params.min_p if params.min_p >= SMALLEST else 0
    rows.top_k_B[row] = min(max(params.top_k, 0), LARGEST_COUNT)
    rows.seed_B[row], rows.position_B[row] = _fold(params.seed or 0), position
    if params.logprobs is not None:
        rows.has_logprobs[...] = True


def fill_biases(
    rows: SamplingRows, row: int, params: SamplingParams, ends: Sequence[int], generated: int
) -> None:
    """Writes a row's logit biases; end tokens get -inf until the answer has ``min_tokens`` tokens.

    generated: number of the answer's tokens before the one to be sampled.
    """
    biases = [*params.logit_bias]
    if generated < params.min_tokens:
        biases += [(token, -np.inf) for token in ends]
    if biases:
        rows.bias_ids_BX[row, : len(biases)], rows.bias_BX[row, : len(biases)] = zip(*biases, strict=True)
        rows.has_biases[...] = True


def fill_penalties(rows: SamplingRows, row: int, run: Run) -> None:
    """Writes a row's penalties; the step counts the row's last token if the seat's counts hold all tokens
    before it. Otherwise ``new_counts`` has all of them."""
    rows.penalties_B3[row] = run.request.params.penalties
    rows.last_B[row] = (run.request.part(run.start + run.count - 1, 1) or [-1])[0]
    rows.is_counted_B[row] = continues(run)
    rows.has_penalties[...] = True


def fill_limits(rows: SamplingRows, row: int, request: Request, generated: int) -> None:
    """Writes the tokens that the request's limits forbid after ``generated`` tokens of its answer.

    The last of these may be on the device only. A bad sequence that may end after it is then a pair: the
    step forbids the pair's second token if the first was sampled.
    """
    limits, known, pairs = request.limits or TokenLimits(), request.token_ids[:generated], []
    if limits.allowed_W is not None:
        rows.allowed_BW[row] &= limits.allowed_W
    rows.last_B[row] = -1 if len(known) < generated else (known or request.prompt_token_ids)[-1]
    for *before, last, banned in limits.bad_sequences:
        ending = [*before, last]
        if len(ending) > generated:
            continue
        if len(known) == generated:
            is_open = known[generated - len(ending) :] == ending
        else:
            is_open = known[len(known) - len(before) :] == before
        if is_open:
            pairs.append((last, banned))
    if pairs:
        rows.bans_BY2[row, : len(pairs)] = pairs
    rows.has_biases[...] = True


def constrain(placed: PlacedRun, inputs: StepInput) -> str | None:
    """Lets a masked row sample only the tokens that its grammar allows; returns why that failed, or None."""
    constraint = placed.run.request.constraint
    if constraint is None or not placed.run.is_masked:
        return None
    allowed_W = inputs.sampling_rows.allowed_BW[placed.sample_row]
    try:
        allowed_W &= constraint.allowed()
    except ValueError as error:
        return str(error)
    if not allowed_W.any():
        return "allowed_token_ids and bad_words leave no token that the grammar allows"
    inputs.sampling_rows.has_biases[...] = True
    return None


def _fold(seed: int) -> np.int32:
    """Folds a 64-bit seed into 32 bits."""
    return np.uint32((seed ^ seed >> 32) & 0xFFFFFFFF).view(np.int32)
