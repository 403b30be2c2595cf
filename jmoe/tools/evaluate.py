"""``jmoe eval``: perplexity on text, and expert statistics of the same run.

Documents are cut into non-overlapping windows; the first token of a window is not scored. ``prefill``
scores whole windows in one pass through the serving path's prefill step; ``decode`` feeds a batch of
windows one token each per step through its decode step (teacher forcing), the only way to see what a
batch-level technique does to quality. With ``max_tokens`` the two score different tokens: prefill scores the
first windows whole, decode the beginnings of ``batch_size`` windows, so that the batch is full.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax import Array

from jmoe.config.techniques import Phase
from jmoe.engine.build import build_engine
from jmoe.engine.deployment.settings import EngineSettings
from jmoe.engine.engine import Engine
from jmoe.engine.step.inputs import StepInput
from jmoe.engine.step.runner import Runner
from jmoe.tools.data import bounded, read_documents, round_robin, windows
from jmoe.tools.progress import Progress, counter, silent

Count = Callable[[int], None]


@dataclass
class Score:
    """The score so far.

    nll: sum over scored tokens in nats, without the tokens that were begun last.
    tokens: number of all tokens that were begun.

    No step's input depends on the result of the step before, so the device works on one step while the host
    takes the results of the one before.
    """

    nll: float = 0.0
    tokens: int = 0
    _pending: tuple[Array, np.ndarray] | None = None

    def begin(self, logprobs: Array, scored: np.ndarray) -> int:
        """Takes log-probabilities that the device may still compute; those marked in ``scored`` are scored.
        It returns their number."""
        self.settle()
        self._pending, count = (logprobs, scored), int(scored.sum())
        self.tokens += count
        return count

    def settle(self) -> None:
        """Waits for the begun log-probabilities. It raises ValueError if one of them is not finite."""
        if self._pending is None:
            return
        logprobs, scored = np.asarray(self._pending[0]), self._pending[1]
        self._pending, found = None, logprobs[scored]
        if not np.isfinite(found).all():
            bad = int(np.sum(~np.isfinite(found)))
            raise ValueError(f"the model gave NaN logits for {bad} of {len(found)} tokens: nothing to score")
        self.nll -= float(found.sum(dtype=np.float64))


def evaluate(
    model: str | Path,
    data: Sequence[Path],
    *,
    mode: Phase = "prefill",
    batch_size: int = 8,
    max_tokens: int | None = None,
    settings: EngineSettings = EngineSettings(),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Returns the report that ``jmoe eval --json`` prints. It raises ValueError for bad data or settings."""
    check_run(data, batch_size, max_tokens)
    settings = dataclasses.replace(settings, max_num_seqs=batch_size)
    with closing(build_engine(model, settings, progress, warm_up=False)) as engine:  # eval has its own shapes
        source = token_windows(engine, data)
        start, count = time.perf_counter(), counter(progress, "score")
        if mode == "prefill":
            score = score_prefill(engine, bounded(source, max_tokens), batch_size, count)
        else:
            score = score_decode(engine, source, batch_size, max_tokens, count)
        seconds = time.perf_counter() - start
        engine.runner.drain()
    if score.tokens == 0:
        raise ValueError("the data holds no window of two tokens or more: nothing to score")
    if lost := int(engine.runner.counters[mode].sums_L["lost_assignments"].sum()):
        raise ValueError(f"{lost} assignments to experts were not computed: the score would be wrong")
    nll = score.nll / score.tokens
    return {
        "mode": mode,
        "perplexity": math.exp(nll),
        "nll_per_token": nll,
        "tokens": score.tokens,
        "seconds": seconds,
        "tokens_per_second": score.tokens / seconds,
        "batch_size": batch_size,
        "max_model_len": engine.max_model_len,
        "moe": engine.runner.counters[mode].report(),
    }


def check_run(data: Sequence[Path], batch_size: int, max_tokens: int | None) -> None:
    """Raises ValueError for sizes below 1 and for a data file that does not exist."""
    if batch_size < 1:
        raise ValueError(f"batch-size must be at least 1, got {batch_size}")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max-tokens must be at least 1, got {max_tokens}")
    missing = [str(path) for path in data if not path.is_file()]
    if missing:
        raise ValueError(f"no such data file: {missing[0]}")


def token_windows(engine: Engine, data: Sequence[Path]) -> Iterator[list[int]]:
    """Returns the data's windows in evaluation order."""
    codec = engine.codec
    if codec is None:
        raise ValueError("this model directory has no tokenizer.json; eval needs one to read text")
    documents = round_robin([read_documents(path) for path in data])
    return windows((codec.encode(d) for d in documents), engine.max_model_len)


def score_prefill(engine: Engine, source: Iterator[list[int]], batch_size: int, count: Count) -> Score:
    """Scores ``batch_size`` windows per pass, padded to the prefill size of the longest."""
    runner, score = engine.runner, Score()
    num_rows = rows_per_rank(runner, batch_size)
    pool = PageRows(engine, num_rows)
    while batch := list(itertools.islice(source, batch_size)):
        done = [0] * len(batch)
        while max(left := [len(w) - d for w, d in zip(batch, done, strict=True)]) > 0:
            size = runner.sizes.prefill_size(max(left))
            inputs = runner.blank("prefill", num_rows, size)
            targets, scored = (
                np.zeros_like(inputs.main_rows.tokens_BT),
                np.zeros(inputs.main_rows.tokens_BT.shape, bool),
            )
            for row, window in enumerate(batch):
                n = max(0, min(size, left[row]))
                _fill(inputs, row, window, done[row], n, pool.table[row])
                following = window[done[row] + 1 : done[row] + n + 1]
                targets[row, : len(following)], scored[row, : len(following)] = following, True
                done[row] += n
            hidden_RND = runner.run(inputs).hidden_RND
            count(score.begin(runner.logprobs(hidden_RND, targets), scored))
    score.settle()
    return score


def score_decode(
    engine: Engine, source: Iterator[list[int]], batch_size: int, max_tokens: int | None, count: Count
) -> Score:
    """Scores windows in decode. The next window at once takes the place of a finished one, so that the batch
    stays full.

    The function ends with the step in which ``max_tokens`` is reached; that step runs and scores only as many
    tokens as are still missing.
    """
    runner, score = engine.runner, Score()
    num_rows = rows_per_rank(runner, batch_size)
    pool = PageRows(engine, num_rows)
    places: list[tuple[list[int], int] | None] = [None] * batch_size
    while True:
        for i, place in enumerate(places):
            if place is None or place[1] + 1 >= len(place[0]):
                window = next(source, None)
                places[i] = None if window is None else (window, 0)
        wanted = batch_size if max_tokens is None else max_tokens - score.tokens
        active = [(i, *place) for i, place in enumerate(places) if place is not None][:wanted]
        if not active:
            score.settle()
            return score
        inputs = runner.blank("decode", num_rows, 1)
        targets, scored = (
            np.zeros_like(inputs.main_rows.tokens_BT),
            np.zeros(inputs.main_rows.tokens_BT.shape, bool),
        )
        for i, window, at in active:
            _fill(inputs, i, window, at, 1, pool.table[i])
            targets[i, 0], scored[i, 0] = window[at + 1], True
            places[i] = (window, at + 1)
        hidden_RND = runner.run(inputs).hidden_RND
        count(score.begin(runner.logprobs(hidden_RND, targets), scored))


def rows_per_rank(runner: Runner, batch_size: int) -> int:
    """Returns the rows per rank of a batch of ``batch_size`` windows, the most that the engine runs
    together."""
    return runner.sizes.decode_size(-(-batch_size // runner.ranks))


class PageRows:
    """The page tables of a batch: every row has a fixed set of pages, enough for the longest window."""

    def __init__(self, engine: Engine, num_rows: int):
        sizes = engine.runner.sizes
        need = num_rows * sizes.table_width
        if need > sizes.pages_per_rank:
            raise ValueError(
                f"a batch of {num_rows} windows a rank needs {need} KV pages and there are "
                f"{sizes.pages_per_rank}: lower --batch-size or raise --kv-memory"
            )
        one_rank = np.arange(need, dtype=np.int32).reshape(num_rows, sizes.table_width)
        self.table = np.tile(one_rank, (engine.runner.ranks, 1))


def _fill(inputs: StepInput, row: int, window: list[int], start: int, count: int, table: np.ndarray) -> None:
    inputs.main_rows.tokens_BT[row, :count] = window[start : start + count]
    inputs.main_rows.positions_BT[row, :count] = np.arange(start, start + count)
    inputs.main_rows.table_BM[row] = table
