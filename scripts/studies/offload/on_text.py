"""Routes text with the bundled model for the parts that simulate the cache on it."""

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from shared.text_routing import collect
from studies.offload.comparators import Subject
from studies.offload.simulator import Trace
from studies.offload.traces import make_traces, route_windows

from jmoe import LLM

Traces = dict[int, list[Trace]]  # by batch
PROMPT, NEW = 128, 64  # tokens in a window
TRAIN = 64  # windows of each domain in the profile
MAIN = 0.25  # share of the experts that have a slot, if a part has only one budget


def simulated(
    data: Path,
    model: str,
    windows: Callable[[LLM], np.ndarray],
    figures: Callable[[Subject, Traces], dict[str, Any]],
    batches: tuple[int, ...] = (1,),
    dry: bool = False,
) -> dict[str, Any]:
    """Returns a part's figures, with the sizes of what was simulated.

    data: folder of the profile's text.
    model: the model.
    windows: function that returns the windows whose routing is traced.
    figures: function that returns the part's own figures.
    batches: sizes of the groups of windows that run together; 1 is among them.
    dry: whether the profile is made from few windows.
    """
    start, source = time.perf_counter(), collect(model, data / "train", 2 if dry else TRAIN)
    profile = source.profile(source.domains)
    sizes = {"dtype": "float32", "max_num_seqs": 16, "max_model_len": PROMPT + NEW, "warm_up": False}
    with closing(LLM(model, **sizes)) as llm:
        windows_WT = windows(llm)
        decoder = llm.engine.runner.model
        routed, cfg = route_windows(decoder, windows_WT), decoder.cfg
        embeddings_VD = np.asarray(decoder.embed[...]).astype(np.float32)
    traces = {batch: make_traces(routed, PROMPT, batch) for batch in batches}
    found = figures(Subject(cfg, embeddings_VD, profile, traces[1]), traces)
    return {
        "windows": len(windows_WT), "prompt": PROMPT, "new": NEW, "profile_tokens": profile.tokens,
        "iterations": int((profile.sample.map_tokens_QM >= 0).sum()),
        "layers": cfg.num_hidden_layers, "experts": cfg.num_experts, "k": cfg.num_experts_per_tok,
        **found, "seconds": round(time.perf_counter() - start),
    }  # fmt: skip
