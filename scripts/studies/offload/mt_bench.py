"""Measures the part mt_bench: every comparator on MT-bench's questions and the model's own answers."""

from pathlib import Path
from typing import Any

import numpy as np
from shared.results import few
from studies.offload.comparators import COMPARATORS, Subject, sweep
from studies.offload.on_text import MAIN, NEW, PROMPT, Traces, simulated
from studies.offload.traces import mt_bench_windows

from jmoe import LLM


def measure(data: Path, model: str, dry: bool = False) -> dict[str, Any]:
    """Returns the part's figures at batch 1."""

    def windows(llm: LLM) -> np.ndarray:
        return mt_bench_windows(llm, data / "workloads/mt_bench.jsonl.gz", PROMPT, NEW)

    def figures(subject: Subject, traces: Traces) -> dict[str, Any]:
        return {"runs": sweep(subject, traces, (MAIN,), tuple(COMPARATORS)[few(dry)])}

    return simulated(data, model, windows, figures, dry=dry)
