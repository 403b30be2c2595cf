"""``jmoe profile``: routing statistics of a model on text, for ``jmoe place`` and the expert-map store.

Windows are cut as in ``jmoe eval``; each counts as one request. The routing is the router's own: no lossy
technique changes it.
"""

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from jmoe.checkpoint.identity import model_identity
from jmoe.engine.build import build_engine
from jmoe.engine.deployment.settings import EngineSettings
from jmoe.engine.deployment.sizes import round_up
from jmoe.engine.step.runner import Runner
from jmoe.engine.step.windows import window_length
from jmoe.mesh import EXPERT
from jmoe.placement.npz import check_writable
from jmoe.placement.profile_builder import ProfileBuilder, RoutedRequest, nearest_seen
from jmoe.tools.data import bounded
from jmoe.tools.evaluate import check_run, token_windows
from jmoe.tools.progress import Progress, counter, silent

SHORTEST = 64  # least padded length of a window, so that few shapes compile
MAPS = 4  # positions per window whose whole gate distributions are kept


def profile(
    model: str | Path,
    data: Sequence[Path],
    out: Path,
    *,
    batch_size: int = 8,
    max_tokens: int | None = None,
    settings: EngineSettings = EngineSettings(),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Writes the profile and returns the report for ``--json``. It raises ValueError for bad data or
    settings."""
    check_run(data, batch_size, max_tokens)
    check_writable(out)
    if settings.moe.shuffle is not None:
        raise ValueError("a profile counts experts as the checkpoint numbers them: leave moe.shuffle out")
    settings = dataclasses.replace(settings, max_num_seqs=batch_size)
    start = time.perf_counter()
    with closing(build_engine(model, settings, progress, warm_up=False)) as engine:
        runner, cfg = engine.runner, engine.runner.cfg
        builder = ProfileBuilder(
            layers=len(cfg.moe_layers), experts=cfg.num_experts, k=cfg.num_experts_per_tok,
            vocab=cfg.vocab_size,
        )  # fmt: skip
        windows, count = 0, counter(progress, "profile")
        for request in routed(runner, bounded(token_windows(engine, data), max_tokens, free=0), batch_size):
            builder.add(request)
            windows += 1
            count(len(request.tokens_N))
        if not windows:
            raise ValueError("the data holds no window of two tokens or more: nothing to profile")
        if windows == builder.num_overflows:
            raise ValueError("the activations of every window overflow: nothing to profile")
        embeddings_VD = np.asarray(runner.model.embed[...]).astype(np.float32)
        made = builder.finish(model_identity(runner.model), nearest_seen(embeddings_VD, builder.seen_V))
    made.save(out)
    return {
        "path": str(out),
        "model": made.model,
        "tokens": made.tokens,
        "windows": windows,
        "overflown_windows": builder.num_overflows,
        "seconds": time.perf_counter() - start,
        "bytes": out.stat().st_size,
    }


def routed(
    runner: Runner, source: Iterator[list[int]], batch_size: int, seed: int = 0
) -> Iterator[RoutedRequest]:
    """Yields the windows with their routing, ``batch_size`` windows per pass, padded to a power of two.

    seed: seed by which the positions are drawn at which whole gate distributions are taken.
    """
    rng = np.random.default_rng(seed)
    rows = round_up(batch_size, runner.ranks)
    while batch := list(itertools.islice(source, batch_size)):
        length = window_length(max(map(len, batch)), runner.mesh.shape[EXPERT], SHORTEST)
        tokens_BT = np.zeros((rows, length), np.int32)
        positions_BT = np.full((rows, length), -1, np.int32)
        picks_BM = np.full((rows, MAPS), -1, np.int32)
        for row, window in enumerate(batch):
            tokens_BT[row, : len(window)], positions_BT[row, : len(window)] = window, np.arange(len(window))
            some = rng.choice(len(window), min(MAPS, len(window)), replace=False)
            picks_BM[row, : len(some)] = some
        found = runner.window_routing(tokens_BT, positions_BT, picks_BM)
        for row, window in enumerate(batch):
            n = len(window)
            yield RoutedRequest(
                tokens_BT[row, :n],
                np.asarray(found.ids_LBTK[:, row, :n]),
                np.asarray(found.weights_LBTK[:, row, :n]),
                np.asarray(found.gates_LBE[:, row]),
                np.asarray(found.embeddings_BD[row]),
                np.asarray(found.maps_BMLE[row]),
                np.where(picks_BM[row] >= 0, tokens_BT[row, picks_BM[row]], -1),
            )
