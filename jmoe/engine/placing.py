"""From the scheduler's plan to the host's arrays of a step: where each run goes, and what its row says."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jmoe.engine.request import SamplingParams
from jmoe.engine.runner import Runner
from jmoe.engine.sampling import SamplingRows
from jmoe.engine.scheduler import Run, Step
from jmoe.engine.step_input import HostRows, StepInput


class Placed(NamedTuple):
    """A run in a step. row: of the sampled tokens. rank: of its request. of, at: its host arrays and its row
    in them."""

    run: Run
    row: int
    rank: int
    of: HostRows
    at: int


def place(step: Step, runner: Runner) -> tuple[list[Placed], StepInput]:
    """The host arrays of a step's shape, all padding yet, and where in them each run goes."""
    by_rank: list[list[Run]] = [[] for _ in range(runner.ranks)]
    for run in step.decodes:
        by_rank[run.request.place.rank].append(run)
    if step.size:
        b = runner.sizes.decode[-1]
        given = runner.blank(1, step.size, beside=b)
        beside = given.beside
        assert beside is not None
    else:
        b = runner.sizes.decode_size(max(map(len, by_rank)))
        given = runner.blank(b, 1)
        beside = given.own
    decodes = [
        Placed(run, rank * b + i, rank, beside, rank * b + i)
        for rank, mine in enumerate(by_rank)
        for i, run in enumerate(mine)
    ]
    ranks = [run.request.place.rank for run in step.prompts]
    prompts = [
        Placed(run, runner.ranks * b + rank, rank, given.own, rank)
        for run, rank in zip(step.prompts, ranks, strict=True)
    ]
    return decodes + prompts, given


def fill(placed: Placed, given: StepInput, ends: Sequence[int]) -> None:
    """The arrays' row of one run. A token that only the device knows is -1. ends: tokens that end an
    answer."""
    run, row, _, of, at = placed
    request, start, count, own = run.request, run.start, run.count, run.request.place
    of.tokens_BT[at, :count] = request.part(start, count) or [-1]
    of.positions_BT[at, :count] = np.arange(start, start + count)
    of.table_BM[at, : len(own.pages)] = own.pages
    if of is given.own:
        given.last_B[at], given.fresh_B[at] = count - 1, start == own.begun
    given.exact_B[row], given.seats_B[row] = request.params.exact, own.seat
    fill_sampling(given.rows, row, request.params, start + count)
    generated = start + count - len(request.prompt_token_ids)
    fill_biases(given.rows, row, request.params, ends, generated)


def fill_sampling(rows: SamplingRows, row: int, params: SamplingParams, position: int) -> None:
    """position: of the token to be drawn."""
    rows.temperature_B[row], rows.top_p_B[row] = params.temperature, params.top_p
    rows.top_k_B[row], rows.min_p_B[row] = max(params.top_k, 0), params.min_p
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
