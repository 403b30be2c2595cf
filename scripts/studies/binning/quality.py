"""Measures quality under LYNX: the bundled model's loss in decode, with batches of one domain or of several.

The engine's decode step takes one token per step from each window, in lock step (teacher forcing), ``batch``
windows at once. The windows are the same at every batch size and setting, so that any two settings compare in
pairs. There is one engine per setting. Here the whole context is computed under binning, and prompts too,
while serving would prefill prompts losslessly. Therefore a second protocol, at one batch size, prefills the
first half of every window.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from jmoe_kernels.settings import BinningMethod
from shared.results import few
from shared.teacher_forcing import Meter, Scorer, batches, counted, read_windows
from studies.binning.curves import CENTINATS

from jmoe.config.moe import MoEConfig
from jmoe.config.techniques import BinningConfig
from jmoe.engine.build import build_engine
from jmoe.engine.deployment.settings import EngineSettings

MIXES = ("single", "mixed")
BATCHES = (4, 8, 16, 32, 64)
HALF_BATCH = 16  # the batch size of the protocol with a prefilled half
WIDTHS = (0.2, 0.35, 0.5, 0.7, 1.0, 1.5)
BUDGETS: dict[BinningMethod, tuple[float, ...]] = {
    "budget": (0.4, 0.5, 0.6, 0.7, 0.85),
    "popularity": (0.4, 0.5, 0.6, 0.7, 0.85),
    "random": (0.5, 0.7, 0.85),
}
K0S = (1, 2, 3)


def settings(dry: bool = False) -> dict[str, BinningConfig]:
    """Returns the measured settings by name, for example "affinity/0.5".

    dry: whether there is only one setting of each method.
    """
    found = {f"affinity/{width}": BinningConfig(bin_width=width) for width in WIDTHS[few(dry)]}
    for method, keeps in BUDGETS.items():
        found |= {f"{method}/{keep}": BinningConfig(method=method, keep=keep) for keep in keeps[few(dry)]}
    return found | {f"oea/{k0}": BinningConfig(method="oea", k0=k0) for k0 in K0S[few(dry)]}


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The way in which windows are batched.

    mix: "single" for batches of one domain, "mixed" for batches of all domains.
    batch: number of windows in a batch.
    half: whether the first half is prefilled, and only the second is decoded and scored.
    """

    mix: str
    batch: int
    half: bool = False

    @property
    def name(self) -> str:
        return f"{self.mix}/{self.batch}{'/half' if self.half else ''}"


def protocols(dry: bool = False) -> list[Protocol]:
    whole = [Protocol(mix, batch) for mix in MIXES[few(dry)] for batch in BATCHES[few(dry)]]
    return whole + [Protocol(mix, HALF_BATCH, half=True) for mix in MIXES[few(dry)]]


class Bench:
    """Runs of one model over ``count`` windows of every domain."""

    def __init__(
        self,
        model: str,
        valid: Path,
        domains: Sequence[str],
        count: int,
        length: int,
        protocols: list[Protocol],
    ):
        self.model, self.domains, self.count, self.protocols = model, domains, count, protocols
        self.windows_NL = read_windows(model, valid, domains, count, length)
        self.scorer = Scorer(model)
        self.settings = EngineSettings(max_num_seqs=max(BATCHES), max_model_len=length)

    def runs(self, cfg: BinningConfig | None, has_singles: bool) -> dict[str, Any]:
        """Returns (loss of each window and position, counts) by protocol.

        If ``has_singles``, the result also has the loss of a few batches of one, as "alone".
        """
        how, found = dataclasses.replace(self.settings, moe=MoEConfig(binning=cfg)), {}
        with closing(build_engine(self.model, how, warm_up=False)) as engine:
            meter = Meter(engine, self.scorer, self.windows_NL)
            if has_singles:
                found["alone"] = meter.run(np.arange(len(self.domains))[:, None] * self.count)
                assert counted(engine.runner)[3] == 0, f"{cfg} remapped in a batch of one"
            for way in self.protocols:
                before, half = counted(engine.runner), self.windows_NL.shape[1] // 2
                batches_SB = batches(len(self.domains), self.count, way.batch, way.mix)
                nll_NP = meter.run(batches_SB, half if way.half else 0)
                active, plain, computed, remapped, steps = counted(engine.runner) - before
                each = steps * engine.runner.cfg.num_hidden_layers
                counts = {"active": round(active / each, 3), "plain": round(plain / each, 3)}
                found[way.name] = nll_NP, counts | {"remapped": round(remapped / computed, 4)}
        return found


def measure(
    model: str, valid: Path, domains: Sequence[str], count: int, length: int, dry: bool = False
) -> dict[str, Any]:
    """Returns the ``quality`` part of the results.

    ``delta`` is the difference between each window's loss and its loss in the lossless run of the same
    protocol, in centinats. ``late`` is the same difference for the window's second half.
    """
    start, ways = time.perf_counter(), protocols(dry)
    bench = Bench(model, valid, domains, count, length, ways)
    lossless = bench.runs(None, has_singles=True)
    runs: dict[str, Any] = {}
    for way in ways:
        nll_NP, counts = lossless[way.name]
        runs[way.name] = {"lossless": {"nll": nll_NP.sum(1).round(2).tolist()} | counts}
    checked: set[str] = set()
    for name, cfg in settings(dry).items():
        found = bench.runs(cfg, has_singles=cfg.method not in checked)
        if cfg.method not in checked:
            same = np.array_equal(found["alone"], lossless["alone"], equal_nan=True)
            assert same, f"{name} changed a batch of one"
        checked.add(cfg.method)
        for way in ways:
            nll_NP, counts = found[way.name]
            delta_NP = CENTINATS * (nll_NP - lossless[way.name][0])
            row = {"delta": whole(delta_NP)} | counts
            if way.batch == HALF_BATCH and not way.half:
                row["late"] = whole(delta_NP[:, length // 2 :])
            runs[way.name][name] = row
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return {
        "domains": list(domains),
        "windows": count,
        "length": length,
        "runs": runs,
        "seconds": round(time.perf_counter() - start),
    }


def whole(delta_NP: np.ndarray) -> list[int]:
    """Returns the sums over the positions, rounded."""
    return np.rint(delta_NP.sum(1)).astype(int).tolist()
