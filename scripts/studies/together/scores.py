"""Measures the bundled model's scores under each set of techniques.

The placement and the profile are made from the train split, in a temporary folder.
"""

import datetime
import os
import platform
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from jmoe.config.moe import MoEConfig
from jmoe.config.techniques import BinningConfig, CapacityConfig, OffloadConfig, ShuffleConfig
from jmoe.engine.deployment.settings import EngineSettings
from jmoe.tools.evaluate import evaluate
from jmoe.tools.place import place
from jmoe.tools.profile import profile
from jmoe.tools.progress import Bars

BOTH, NEAR = "shuffle and capacity", "all four, near first"
ROWS = ("plain", "binning", "capacity", "shuffle", "offload", BOTH, "all four", NEAR)
LENGTH = 256  # tokens in a window


class ScoreSizes(NamedTuple):
    """The sizes of a run.

    tokens: number of tokens that are scored with each set of techniques.
    profile_tokens: number of tokens of the train split that are profiled.
    batch: number of sequences of a step.
    ranks: number of devices, which all belong to one expert group.
    """

    tokens: int
    profile_tokens: int
    batch: int
    ranks: int


def measure(data: Path, sizes: ScoreSizes) -> dict[str, Any]:
    """Returns the figures of the study."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, Bars() as bars:
        statistics, placed = Path(folder) / "profile.npz", Path(folder) / "placement.npz"
        texts = sorted((data / "train").glob("*.txt.xz"))
        alone = EngineSettings(max_model_len=LENGTH)
        profile("tiny", texts, statistics, max_tokens=sizes.profile_tokens, settings=alone)
        place(statistics, sizes.ranks, placed, "alternating", 0, bars)
        rows = {row: score(data, sizes, techniques(row, placed, statistics)) for row in ROWS}
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("jmoe", "jax", "numpy")},
        "ranks": sizes.ranks, "batch": sizes.batch, "length": LENGTH,
        "seconds": round(time.perf_counter() - start),
        "rows": rows,
    }  # fmt: skip


def techniques(row: str, placement: Path, profile: Path) -> MoEConfig:
    """Returns the settings of a row."""
    every: dict[str, Any] = {
        "binning": BinningConfig(),
        "capacity": CapacityConfig(factor=2.0, policy="reroute", phase="both"),
        "shuffle": ShuffleConfig(str(placement)),
        "offload": OffloadConfig(slots_per_layer=2, store=str(profile)),
    }
    if row == NEAR:  # by a bin's width
        every["binning"] = BinningConfig(local_bonus=0.5, resident_bonus=0.5)
    names = every if row in ("all four", NEAR) else row.split(" and ")
    on = {name: every[name] for name in every if name in names}
    return MoEConfig(attention="tp", transport="ragged_all_to_all", **on)


def score(data: Path, sizes: ScoreSizes, moe: MoEConfig) -> dict[str, Any]:
    """Returns the report of one set of techniques, with their settings. A short first run compiles."""
    settings = EngineSettings(
        max_model_len=LENGTH, dtype="float32", attention="tp", moe=moe, expert_parallel_size=sizes.ranks
    )
    texts = sorted((data / "valid").glob("*.txt.xz"))
    for tokens in (sizes.batch, sizes.tokens):
        report = evaluate(
            "tiny", texts, mode="decode", batch_size=sizes.batch, max_tokens=tokens, settings=settings
        )
    on = {
        name: asdict(getattr(moe, name))
        for name in ("binning", "capacity", "shuffle", "offload")
        if getattr(moe, name)
    }
    for name in set(on) & {"shuffle", "offload"}:
        on[name] = {key: value for key, value in on[name].items() if key not in ("placement", "store")}
    moved = {key: value for key, value in report["moe"].items() if key != "per_layer"}
    return {key: report[key] for key in ("nll_per_token", "perplexity", "tokens", "tokens_per_second")} | {
        "settings": on, "moe": moved,
    }  # fmt: skip
