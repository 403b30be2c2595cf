"""Measures the expert cache with quantised experts: pools of the same bytes, their hits, and the quality.

All figures are counts and sums of log-probabilities, which other work on the machine does not change.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from shared.results import few

from jmoe.checkpoint import read_config
from jmoe.checkpoint.quantised.codings import read_codings
from jmoe.config.choices import QuantizationName
from jmoe.config.moe import MoEConfig
from jmoe.config.techniques import OffloadConfig
from jmoe.engine.deployment.settings import EngineSettings, model_directory
from jmoe.engine.offload.build import count_slots
from jmoe.mesh import make_mesh
from jmoe.moe.expert_leaves import expert_bytes, store_codings
from jmoe.tools.evaluate import evaluate

# how experts are stored; the other weights are bfloat16
FORMS: dict[str, QuantizationName | None] = {"bfloat16": None, "int8": "int8", "int4 g32": "int4"}
MEMORY = ("2MiB", "5MiB", "9MiB")  # of the device, for experts
TOKENS = {1: 1024, 8: 4096}  # tokens that a run in decode steps scores, by batch
SCORED = 32768  # tokens of the quality
LENGTH = 256  # tokens of a window


def settings_of(form: str, offload: OffloadConfig | None) -> EngineSettings:
    """Returns the settings of a form of experts; all of them are on the device if ``offload`` is None."""
    plain = EngineSettings(max_model_len=LENGTH, dtype="bfloat16", moe=MoEConfig(offload=offload))
    method = FORMS[form]
    return plain if method is None else replace(plain, quantization=method, quantize="experts")


def measure(data: Path, model: str, dry: bool = False) -> dict[str, Any]:
    """Returns the figures of the ``quantised`` part: sizes and quality by form, hits by batch and memory."""
    start, texts = time.perf_counter(), sorted((data / "valid").glob("*.txt.xz"))
    forms: dict[str, Any] = {}
    for form in FORMS:
        report = evaluate(model, texts, max_tokens=512 if dry else SCORED, settings=settings_of(form, None))
        forms[form] = {"nll": round(report["nll_per_token"], 5), "perplexity": round(report["perplexity"], 4)}
        forms[form] |= _sizes(model, form)
        print(form, forms[form], flush=True)
    runs: dict[str, Any] = {}
    for batch, tokens in [*TOKENS.items()][few(dry)]:
        for memory in MEMORY[few(dry)]:
            offload, rows = OffloadConfig(memory=memory), {}  # pyright: ignore[reportArgumentType]
            for form in FORMS:
                report = evaluate(
                    model, texts, mode="decode", batch_size=batch, max_tokens=64 if dry else tokens,
                    settings=settings_of(form, offload),
                )  # fmt: skip
                rows[form] = _figures(report)
                print(batch, memory, form, rows[form], flush=True)
            runs[f"{batch}/{memory}"] = rows
    return {
        "scored": SCORED, "length": LENGTH, "tokens": {str(k): v for k, v in TOKENS.items()},
        "forms": forms, "runs": runs, "seconds": round(time.perf_counter() - start),
    }  # fmt: skip


def _sizes(model: str, form: str) -> dict[str, Any]:
    """Returns the bytes of an expert, the number of all experts, and the slots of each memory."""
    directory = model_directory(model)
    cfg = read_config(directory, "bfloat16")
    codings = store_codings(cfg, read_codings(directory, cfg, settings_of(form, None).quantization_request))
    slots = {
        memory: count_slots(cfg, OffloadConfig(memory=memory), make_mesh(), codings)  # pyright: ignore[reportArgumentType]
        for memory in MEMORY
    }
    experts = len(cfg.moe_layers) * cfg.num_experts
    return {"expert_bytes": expert_bytes(cfg, codings), "experts": experts, "slots": slots}


def _figures(report: dict[str, Any]) -> dict[str, Any]:
    """Returns what a run copied, and its loss, which does not depend on the pool."""
    moe = report["moe"]
    hits, misses = moe["expert_cache_hits"], moe["expert_cache_misses"]
    return {
        "hit": round(hits / (hits + misses), 4),
        "bytes_step": round(moe["bytes_host_to_device"] / moe["steps"]),
        "useful": round(moe["prefetch_useful_bytes"] / max(moe["prefetch_bytes"], 1), 4),
        "nll": round(report["nll_per_token"], 5),
    }
