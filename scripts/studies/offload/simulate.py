"""Measures the part simulate: every comparator, budget and batch on held-out text, in the simulator."""

from pathlib import Path
from typing import Any

import numpy as np
from shared.results import few
from studies.offload.comparators import COMPARATORS, Subject, sweep
from studies.offload.on_text import NEW, PROMPT, Traces, simulated
from studies.offload.traces import valid_windows

from jmoe import LLM

BATCHES = (1, 4, 8, 16)
SHARES = (0.1, 0.25, 0.5, 0.75)


def measure(data: Path, model: str, num_per_domain: int, dry: bool = False) -> dict[str, Any]:
    """Returns the part's figures on ``num_per_domain`` windows of every domain."""

    def windows(llm: LLM) -> np.ndarray:
        return valid_windows(llm, data / "valid", num_per_domain, PROMPT + NEW)

    def figures(subject: Subject, traces: Traces) -> dict[str, Any]:
        return {"runs": sweep(subject, traces, SHARES[few(dry)], tuple(COMPARATORS)[few(dry)])}

    return simulated(data, model, windows, figures, BATCHES[few(dry)], dry=dry)
