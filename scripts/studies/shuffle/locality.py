"""Measures what binning's ``local_bonus`` costs in quality and saves in traffic: it prefers a token's device.

This is not in the papers. The bundled model runs on 8 emulated expert ranks. Decode runs in lock step as in
``shared.teacher_forcing``, with two sequences per rank, and the domains take turns within a batch. The bonus
is measured alone (with a bin wider than every gap) and with binning. The experts are placed in the order of
their numbers in the checkpoint.
"""

import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from shared.peaks import RANKS
from shared.results import few
from shared.teacher_forcing import Meter, Scorer, batches, read_windows

from jmoe.config.moe import MoEConfig
from jmoe.config.techniques import BinningConfig
from jmoe.engine.build import build_engine
from jmoe.engine.deployment.settings import EngineSettings

BATCH = 16
BONUSES = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5)
WIDTHS = {"no binning": 1e9, "bins of 0.5": 0.5}
COUNT, LENGTH = 16, 64  # windows of each domain, tokens of each window


def measure(
    model: str,
    valid: Path,
    domains: Sequence[str],
    count: int = COUNT,
    length: int = LENGTH,
    *,
    dry: bool = False,
) -> dict[str, Any]:
    """Returns the ``locality`` part of the results: by binning and bonus, figures a token and layer.

    The loss ``nll`` is by window.
    """
    start = time.perf_counter()
    windows_NL, scorer = read_windows(model, valid, domains, count, length), Scorer(model)
    batches_SB = batches(len(domains), count, BATCH, "mixed")
    runs: dict[str, Any] = {name: {} for name in WIDTHS}
    for name, width in WIDTHS.items():
        for bonus in BONUSES[few(dry)]:
            binning = BinningConfig(bin_width=width, local_bonus=bonus)
            how = EngineSettings(
                max_num_seqs=BATCH, max_model_len=length, expert_parallel_size=RANKS,
                moe=MoEConfig(binning=binning),
            )  # fmt: skip
            with closing(build_engine(model, how, warm_up=False)) as engine:
                nll_NP = Meter(engine, scorer, windows_NL).run(batches_SB)
                engine.runner.drain()
                decode = engine.runner.counters["decode"]
            tokens = decode.counts_LE.sum() / engine.runner.cfg.num_experts_per_tok
            runs[name][str(bonus)] = {
                "nll": nll_NP.sum(1).round(2).tolist(),
                "remote": round(float(decode.sums_L["remote_assignments"].sum() / decode.counts_LE.sum()), 4),
                "rows": round(float(decode.sums_L["transport_useful_bytes"].sum() / tokens), 4),
                "active": round(float(decode.active_L.mean() / decode.steps), 3),
            }
            print(f"{name}, {bonus}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return {
        "domains": list(domains),
        "windows": count,
        "length": length,
        "ranks": RANKS,
        "batch": BATCH,
        "runs": runs,
        "seconds": round(time.perf_counter() - start),
    }
