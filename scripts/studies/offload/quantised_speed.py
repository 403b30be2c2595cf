"""Measures the time of decode steps with quantised experts in pools of the same bytes, on an idle machine.

On a CPU a copy is as fast as memory and nothing runs at the same time, so the times show what the copies, the
bookkeeping and the products of each form cost, not what overlap saves.
"""

import statistics
import time
from pathlib import Path
from typing import Any

from shared.results import few
from studies.offload.quantised import FORMS, MEMORY, settings_of

from jmoe.config.techniques import OffloadConfig
from jmoe.tools.evaluate import evaluate

TOKENS = 512  # tokens that a round scores, one a step
ROUNDS = 3  # of every form in turn, after one that compiles


def measure(data: Path, model: str, dry: bool = False) -> dict[str, Any]:
    """Returns the figures of the ``quantised_speed`` part: milliseconds a step by memory and form."""
    start, texts = time.perf_counter(), sorted((data / "valid").glob("*.txt.xz"))
    runs: dict[str, Any] = {}
    for memory in (None, *MEMORY)[few(dry)]:
        offload = None if memory is None else OffloadConfig(memory=memory)  # pyright: ignore[reportArgumentType]
        times: dict[str, list[float]] = {form: [] for form in FORMS}
        for _ in range(1 if dry else 1 + ROUNDS):
            for form, found in times.items():
                report = evaluate(
                    model, texts, mode="decode", batch_size=1, max_tokens=16 if dry else TOKENS,
                    settings=settings_of(form, offload),
                )  # fmt: skip
                found.append(1e3 * report["seconds"] / report["tokens"])
        timed = {form: found if dry else found[1:] for form, found in times.items()}
        runs[memory or "resident"] = {form: round(statistics.median(ms), 2) for form, ms in timed.items()}
        print(memory, runs, flush=True)
    return {"tokens": TOKENS, "rounds": ROUNDS, "runs": runs, "seconds": round(time.perf_counter() - start)}
