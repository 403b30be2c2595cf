"""Measures the parts simulate, mt_bench and sensitivity: the bundled model's routing of text, simulated."""

import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from shared.results import few
from shared.text_routing import collect
from studies.offload.simulate import COMPARATORS, VARIED, Subject, sensitivity, sweep
from studies.offload.traces import make_traces, mt_bench_windows, route_windows, valid_windows

from jmoe import LLM

PROMPT, NEW = 128, 64  # tokens in a window
TRAIN = 64  # windows of each domain in the profile
SHARES = (0.1, 0.25, 0.5, 0.75)
MAIN = 0.25


def measure(part: str, data: Path, model: str, windows: int, dry: bool = False) -> dict[str, Any]:
    """Returns the part's figures. ``windows`` windows of each domain come from held-out text."""
    start, source = time.perf_counter(), collect(model, data / "train", 2 if dry else TRAIN)
    profile = source.profile(source.domains)
    sizes = {"dtype": "float32", "max_num_seqs": 16, "max_model_len": PROMPT + NEW, "warm_up": False}
    with closing(LLM(model, **sizes)) as llm:
        if part == "mt_bench":
            windows_WT = mt_bench_windows(llm, data / "workloads/mt_bench.jsonl.gz", PROMPT, NEW)
        else:
            windows_WT = valid_windows(llm, data / "valid", windows, PROMPT + NEW)
        decoder = llm.engine.runner.model
        routed, cfg = route_windows(decoder, windows_WT), decoder.cfg
        embeddings_VD = np.asarray(decoder.embed[...]).astype(np.float32)
    batches = ((1, 4, 8, 16) if part == "simulate" else (1,))[few(dry)]
    by_batch = {batch: make_traces(routed, PROMPT, batch) for batch in batches}
    subject = Subject(cfg, embeddings_VD, profile, by_batch[1])
    if part == "sensitivity":
        slots = round(cfg.num_hidden_layers * cfg.num_experts * MAIN)
        found = {"slots": slots, "runs": sensitivity(subject, slots, VARIED[few(dry)])}
    else:
        shares = SHARES[few(dry)] if part == "simulate" else (MAIN,)
        found = {"runs": sweep(subject, by_batch, shares, tuple(COMPARATORS)[few(dry)])}
    return {
        "windows": len(windows_WT), "prompt": PROMPT, "new": NEW, "profile_tokens": profile.tokens,
        "iterations": int((profile.sample.map_tokens_QM >= 0).sum()),
        "layers": cfg.num_hidden_layers, "experts": cfg.num_experts, "k": cfg.num_experts_per_tok,
        **found, "seconds": round(time.perf_counter() - start),
    }  # fmt: skip
