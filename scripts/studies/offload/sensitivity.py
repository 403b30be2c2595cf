"""Measures the part sensitivity: the cache simulated on held-out text, one parameter changed at a time."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from shared.results import few
from studies.offload.comparators import STATED, VARIED, Setting, Subject, rounded, simulate
from studies.offload.on_text import MAIN, NEW, PROMPT, Traces, simulated
from studies.offload.traces import valid_windows

from jmoe import LLM


def measure(data: Path, model: str, num_per_domain: int, dry: bool = False) -> dict[str, Any]:
    """Returns the part's figures on ``num_per_domain`` windows of every domain."""

    def windows(llm: LLM) -> np.ndarray:
        return valid_windows(llm, data / "valid", num_per_domain, PROMPT + NEW)

    def figures(subject: Subject, traces: Traces) -> dict[str, Any]:
        slots = round(subject.cfg.num_hidden_layers * subject.cfg.num_experts * MAIN)
        return {"slots": slots, "runs": sensitivity(subject, slots, VARIED[few(dry)])}

    return simulated(data, model, windows, figures, dry=dry)


def sensitivity(subject: Subject, slots: int, names: tuple[str, ...]) -> dict[str, Any]:
    """Returns the figures at batch 1 and one budget, with one parameter changed at a time."""
    settings = {
        **{
            f"copy time {c:g}": Setting(slots, link=STATED._replace(copy_time=c))
            for c in (0.25, 0.5, 2.0, 4.0)
        },
        **{f"{n} prefetches a layer": Setting(slots, max_prefetches=n) for n in (1, 2, 4)},
        **{f"{a} layers ahead": Setting(slots, distance=a) for a in (1, 2)},
        **{f"store of {c}": Setting(slots, store=c) for c in (250, 4000)},
    }
    found = {}
    for what, setting in settings.items():
        found[what] = {name: rounded(simulate(subject, name, setting)) for name in names}
        jax.clear_caches()
        print(what, flush=True)
    return found
