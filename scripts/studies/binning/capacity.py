"""Measures binning and a capacity together on 8 emulated expert ranks: what each does to the other.

Load and loss are measured. Decode runs in lock step as in ``shared.teacher_forcing``, and the domains take
turns within a batch. The capacity counts each rank's own tokens after binning. In decode it is our extension,
because the paper limits prefill. Peaks are means over steps and layers, divided by the even share of plain
top-k's assignments (``shared.peaks``).
"""

import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from shared.peaks import RANKS, device_peak, expert_peak, rank_loads
from shared.results import few
from shared.teacher_forcing import Meter, Scorer, batches, counted, read_windows

from jmoe.config.moe import MoEConfig
from jmoe.config.techniques import BinningConfig, CapacityConfig
from jmoe.engine.build import build_engine
from jmoe.engine.deployment.settings import EngineSettings
from jmoe.engine.engine import Engine

BATCHES = (16, 64)
WIDTHS = (None, 0.7, 0.5, 0.35)
POLICIES = (None, "drop", "reroute")
FACTORS = (1.0, 1.5, 2.0)
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
    """Returns the ``capacity`` part of the results: figures by batch, binning's width and policy/gamma."""
    sizes, factors = BATCHES[few(dry)], FACTORS[few(dry)]
    start = time.perf_counter()
    windows_NL, scorer = read_windows(model, valid, domains, count, length), Scorer(model)
    runs: dict[str, Any] = {str(batch): {} for batch in sizes}
    for width in WIDTHS[:2] if dry else WIDTHS:
        binning = None if width is None else BinningConfig(bin_width=width)
        for policy in POLICIES:
            capacity = None if policy is None else CapacityConfig(policy=policy, phase="decode")
            how = EngineSettings(
                max_num_seqs=max(sizes), max_model_len=length, expert_parallel_size=RANKS,
                moe=MoEConfig(binning=binning, capacity=capacity),
            )  # fmt: skip
            with closing(build_engine(model, how, warm_up=False)) as engine:
                meter = Meter(engine, scorer, windows_NL)
                for batch in sizes:
                    batches_SB = batches(len(domains), count, batch, "mixed")
                    row = runs[str(batch)].setdefault(str(width or "off"), {})
                    for factor in factors if policy else (1.0,):
                        engine.runner.knobs["capacity.factor"] = factor
                        name = f"{policy}/{factor:g}" if policy else "off"
                        row[name] = loads_and_loss(meter, engine, batches_SB)
            print(f"{width}, {policy}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return {
        "domains": list(domains),
        "windows": count,
        "length": length,
        "ranks": RANKS,
        "runs": runs,
        "seconds": round(time.perf_counter() - start),
    }


def loads_and_loss(meter: Meter, engine: Engine, batches_SB: np.ndarray) -> dict[str, Any]:
    """Returns the figures of one setting. ``nll`` is the loss of each window."""
    runner, peaks = engine.runner, []
    counters = runner.counters["decode"]
    plain = batches_SB.shape[1] * runner.cfg.num_experts_per_tok
    before = counted(runner)
    lost = counters.sums_L["dropped"].sum(), counters.sums_L["rerouted"].sum()
    last_LE = counters.counts_LE.copy()

    def look() -> None:
        nonlocal last_LE
        runner.drain()
        now_LE = counters.counts_LE.copy()
        for counts_E in now_LE - last_LE:
            peaks.append((expert_peak(counts_E, plain), device_peak(rank_loads(counts_E), plain)))
        last_LE = now_LE

    nll_NP = meter.run(batches_SB, on_step=look)
    active, _, _, remapped, steps = counted(runner) - before
    each = steps * runner.cfg.num_hidden_layers
    dropped = counters.sums_L["dropped"].sum() - lost[0]
    rerouted = counters.sums_L["rerouted"].sum() - lost[1]
    expert, device = np.mean(peaks, 0)
    return {
        "nll": nll_NP.sum(1).round(2).tolist(),
        "active": round(active / each, 3),
        "expert_peak": round(float(expert), 4),
        "device_peak": round(float(device), 4),
        "remapped": round(remapped / each / plain, 4),
        "dropped": round(dropped / each / plain, 4),
        "rerouted": round(rerouted / each / plain, 4),
    }
