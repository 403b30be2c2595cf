"""Measures the expert cache of a random model of real sizes: its routing is simulated, the engine is timed.

The tokens are random and follow Zipf's law, and the model learned nothing that connects its layers. So
predictors can find only what any model has: a token's own experts, and a residual stream that one layer
changes little.
"""

import statistics
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from shared.random_checkpoint import checkpoint
from shared.results import few
from studies.offload.comparators import COMPARATORS, Subject, sweep
from studies.offload.traces import make_traces, random_windows, route_windows

from jmoe import LLM, MoEConfig, SamplingParams
from jmoe.checkpoint import read_config
from jmoe.config.reading import read_toml
from jmoe.config.techniques import OffloadConfig
from jmoe.placement.profile_builder import ProfileBuilder, nearest_seen
from jmoe.tools.profile import routed

LENGTH, PROMPT, PROFILE, TEST = 96, 32, 64, 8
SHARES = (0.25, 0.5)
CASES = {
    "LRU": ("none", "lru"),
    "default": ("next_gate", "expected_use"),
}


def measure(sizes: Path, dry: bool = False) -> dict[str, Any]:
    """Returns the figures of the ``large`` part.

    sizes: TOML file of the model's sizes.
    dry: whether only the first budget, batch and case are measured.
    """
    start, part = time.perf_counter(), few(dry)
    scale = 1 / (0.02 * read_toml(sizes)["hidden_size"] ** 0.5)  # a gate's input has unit square mean
    with checkpoint(str(sizes), gate_scale=scale) as directory:
        runs, engine = _simulated(directory, part), _engine(directory, part)
    seconds = round(time.perf_counter() - start)
    return {"sizes": sizes.stem, "runs": runs, "engine": engine, "seconds": seconds}


def _simulated(directory: Path, part: slice) -> dict[str, Any]:
    with closing(LLM(directory, max_num_seqs=8, max_model_len=LENGTH, warm_up=False)) as llm:
        runner, cfg = llm.engine.runner, llm.engine.runner.cfg
        builder = ProfileBuilder(
            layers=cfg.num_hidden_layers, experts=cfg.num_experts, k=cfg.num_experts_per_tok,
            vocab=cfg.vocab_size,
        )  # fmt: skip
        for request in routed(runner, iter(random_windows(cfg.vocab_size, PROFILE, LENGTH, 0).tolist()), 8):
            builder.add(request)
        embeddings_VD = np.asarray(runner.model.embed[...]).astype(np.float32)
        profile = builder.finish("random", nearest_seen(embeddings_VD, builder.seen_V))
        windows = route_windows(runner.model, random_windows(cfg.vocab_size, TEST, LENGTH, 1))
    by_batch = {batch: make_traces(windows, PROMPT, batch) for batch in (1, 4)[part]}
    names = tuple(COMPARATORS)[part]
    return sweep(Subject(cfg, embeddings_VD, profile, by_batch[1]), by_batch, SHARES[part], names)


def _engine(directory: Path, part: slice) -> dict[str, Any]:
    """Returns milliseconds a decode step at batch 1, and whether the tokens are the resident engine's."""
    found: dict[str, Any] = {}
    cfg = read_config(directory)
    prompts = random_windows(cfg.vocab_size, 1, PROMPT, 2).tolist()
    greedy = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    cases: dict[str, OffloadConfig | None] = {"resident": None}
    for share in SHARES[part]:
        for name, (predictor, eviction) in [*CASES.items()][part]:
            cases[f"{name} {share:g}"] = OffloadConfig(
                slots_per_layer=round(cfg.num_experts * share), predictor=predictor, eviction=eviction  # pyright: ignore[reportArgumentType]
            )  # fmt: skip
    wanted: list[int] = []
    for name, offload in cases.items():
        sizes: dict[str, Any] = {"max_num_seqs": 1, "max_model_len": LENGTH, "max_num_batched_tokens": 64}
        sizes["enable_prefix_caching"] = False  # the prompts are sent more than once
        with closing(LLM(directory, moe=MoEConfig(offload=offload), **sizes)) as llm:
            times, tokens = [], []
            for _ in range(3):
                start = time.perf_counter()
                tokens = llm.generate(prompts, greedy)[0].outputs[0].token_ids
                times.append(1e3 * (time.perf_counter() - start) / len(tokens))
            decode = llm.engine.moe_stats()["decode"]
        wanted = wanted or tokens
        hits, misses = decode["expert_cache_hits"], decode["expert_cache_misses"]
        found[name] = {
            "ms": round(statistics.median(times), 2),
            "hit": round(hits / max(hits + misses, 1), 4),
            "bytes_step": round(decode["bytes_host_to_device"] / decode["steps"]),
            "same": tokens == wanted,
        }
        print(name, found[name], flush=True)
    return found
