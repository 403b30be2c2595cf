"""From the scheduler's plan to the host's arrays of a step: where each run goes, and what its row says."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jmoe.engine.request import SamplingParams
from jmoe.engine.schedule.plan import Run, Step
from jmoe.engine.step.inputs import HostRows, StepInput
from jmoe.engine.step.runner import Runner
from jmoe.engine.step.sampling import SamplingRows

SMALLEST = float(np.finfo(np.float32).tiny)  # devices take what is below it for 0, or not
LARGEST_COUNT = np.iinfo(np.int32).max


class Placed(NamedTuple):
    """A run in a step. row: of the drawn tokens. of, at: its host arrays and its rows in them. changed: those
    rows among all of the step. rank, column: where its first token is in the grid."""

    run: Run
    row: int
    of: HostRows
    at: slice
    changed: slice
    rank: int
    column: int


def place(step: Step, runner: Runner) -> tuple[list[Placed], StepInput]:
    """The host arrays of a step's shape, all padding yet, and where in them each run goes.

    A rank's runs take one row each of the tokens that are drawn: no more run there than may be drawn.
    """
    decodes, prompts = (by_rank(runs, runner.ranks) for runs in (step.decodes, step.prompts))
    length, rows = runner.sizes.run, step.size // runner.sizes.run
    if step.size:
        b = runner.sizes.beside_size(max(len(d) + len(p) for d, p in zip(decodes, prompts, strict=True)))
        given = runner.blank("prefill", rows, length, b)
    else:
        b = runner.sizes.decode_size(max(map(len, decodes)))
        given = runner.blank("decode", b, 1)
    placed = []
    for rank in range(runner.ranks):
        for i, run in enumerate(decodes[rank]):
            row = rank * b + i
            at = slice(row, row + 1)
            placed.append(Placed(run, row, given.beside or given.own, at, at, rank, i))
        first = 0  # of the rank's rows
        for i, run in enumerate(prompts[rank], len(decodes[rank])):
            count = -(-run.count // length)
            at = slice(rank * rows + first, rank * rows + first + count)
            changed = slice(runner.ranks * b + at.start, runner.ranks * b + at.stop)
            placed.append(Placed(run, rank * b + i, given.own, at, changed, rank, b + first * length))
            first += count
    return placed, given


def by_rank(runs: list[Run], ranks: int) -> list[list[Run]]:
    found: list[list[Run]] = [[] for _ in range(ranks)]
    for run in runs:
        found[run.request.place.rank].append(run)
    return found


def fill(placed: Placed, given: StepInput, ends: Sequence[int]) -> None:
    """The arrays' rows of one run. A token that only the device knows is -1. ends: tokens that end an
    answer."""
    run, row, of, at, _, _, column = placed
    request, start, count, own = run.request, run.start, run.count, run.request.place
    of.tokens_BT[at].reshape(-1)[:count] = request.part(start, count) or [-1]  # rows lie one behind another
    of.positions_BT[at].reshape(-1)[:count] = np.arange(start, start + count)
    of.table_BM[at, : len(own.pages)] = own.pages
    of.exact_B[at], of.seats_B[at] = request.params.exact, own.seat
    of.fresh_B[at.start] = start == own.begun
    given.behind_B[row], given.seats_B[row] = column + count - 1, own.seat
    fill_sampling(given.rows, row, request.params, start + count)
    generated = start + count - len(request.prompt_token_ids)
    fill_biases(given.rows, row, request.params, ends, generated)


def fill_sampling(rows: SamplingRows, row: int, params: SamplingParams, position: int) -> None:
    """position: of the token to be drawn. What the arrays cannot hold becomes its limit."""
    rows.temperature_B[row] = params.temperature if params.temperature >= SMALLEST else 0
    rows.top_p_B[row] = params.top_p if params.top_p >= SMALLEST else 0
    rows.min_p_B[row] = params.min_p if params.min_p >= SMALLEST else 0
    rows.top_k_B[row] = min(max(params.top_k, 0), LARGEST_COUNT)
    rows.seed_B[row], rows.position_B[row] = _fold(params.seed or 0), position
    if params.logprobs is not None:
        rows.logprobs[...] = True


def fill_biases(
    rows: SamplingRows, row: int, params: SamplingParams, ends: Sequence[int], generated: int
) -> None:
    """generated: tokens of the answer before the one to be drawn; the first ``min_tokens`` end nothing."""
    biases = [*params.logit_bias]
    if generated < params.min_tokens:
        biases += [(token, -np.inf) for token in ends]
    if biases:
        rows.biased_BX[row, : len(biases)], rows.bias_BX[row, : len(biases)] = zip(*biases, strict=True)
        rows.shaped[...] = True


def constrain(placed: Placed, given: StepInput) -> str | None:
    """Lets the row draw only what its grammar allows; why that failed, or None."""
    constraint = placed.run.request.constraint
    if constraint is None or not placed.run.draws:
        return None
    try:
        given.rows.allowed_BW[placed.row] = constraint.allowed()
    except ValueError as error:
        return str(error)
    given.rows.shaped[...] = True
    return None


def _fold(seed: int) -> np.int32:
    """64 bits of seed in 32."""
    return np.uint32((seed ^ seed >> 32) & 0xFFFFFFFF).view(np.int32)
