"""Runs the engine on 8 emulated devices: compares all pipelines' greedy tokens, and counts what crossed.

The wall time is that of 8 devices on a few cores with copies in place of links. It shows only that nothing is
broken.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from shared.text_routing import beginning, collect, domains_of, pieces

from jmoe import LLM, MoEConfig, SamplingParams
from jmoe.config.techniques import ShuffleConfig
from jmoe.placement.group import group

RANKS, GROUPS = 4, 2  # expert ranks, as many as the bundled model has heads to split; data groups
WINDOWS = 8  # windows of each domain in the statistics: the placement need not be good here
PROMPT, NEW, SEQUENCES = 48, 16, 32


def measure(model: str, data: Path) -> dict[str, Any]:
    """Returns by pipeline its counters and how many sequences got the tokens of plain."""
    start = time.perf_counter()
    train = collect(model, data / "train", WINDOWS)
    placement = group(train.profile(train.domains), ranks=RANKS, seed=0)
    valid, domains = data / "valid", domains_of(data / "valid")
    by_domain = [pieces(valid / f"{domain}.txt.xz", 3) for domain in domains]
    texts = [piece for turn in zip(*by_domain, strict=True) for piece in turn]
    runs: dict[str, Any] = {}
    reference = None
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "placement.npz")
        placement.save(Path(path))
        for name, (attention, shuffle) in {
            "plain": ("tp", None),
            "grouped": ("tp", ShuffleConfig(path, tokens=False)),
            "shuffled": ("tp", ShuffleConfig(path)),
            "dp": ("dp", None),
            "dp, grouped": ("dp", ShuffleConfig(path, tokens=False)),
            "dp, requests": ("dp", ShuffleConfig(path, tokens=False, requests=True)),
        }.items():
            tokens, row = run(model, texts[:SEQUENCES], attention, shuffle)
            reference = tokens if reference is None else reference
            same = sum(a == b for a, b in zip(tokens, reference, strict=True))
            runs[name] = {"same": same, **row}
            print(f"{name}: {time.perf_counter() - start:.0f} s, {same} alike", file=sys.stderr, flush=True)
    return {
        "ranks": RANKS,
        "groups": GROUPS,
        "sequences": len(texts[:SEQUENCES]),
        "prompt": PROMPT,
        "new": NEW,
        "runs": runs,
        "seconds": round(time.perf_counter() - start),
    }


def run(
    model: str, texts: list[str], attention: str, shuffle: ShuffleConfig | None
) -> tuple[list[list[int]], dict[str, Any]]:
    moe = MoEConfig(shuffle=shuffle, transport="ragged_all_to_all")
    sizes: dict[str, Any] = {"max_num_seqs": SEQUENCES, "max_model_len": 64, "max_num_batched_tokens": 64}
    greedy = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
    with LLM(
        model, moe=moe, attention=attention, expert_parallel_size=RANKS, data_parallel_size=GROUPS,
        dtype="float32", warm_up=False, enable_prefix_caching=False, **sizes,
    ) as llm:  # fmt: skip
        prompts = [beginning(llm, text, PROMPT) for text in texts]
        llm.generate(prompts, SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))  # compiles
        before = llm.engine.moe_stats()
        start = time.perf_counter()
        outputs = llm.generate(prompts, greedy)
        seconds = time.perf_counter() - start
        after = llm.engine.moe_stats()
    return [list(o.outputs[0].token_ids) for o in outputs], {
        phase: counters(before[phase], after[phase]) for phase in ("prefill", "decode")
    } | {"wall_seconds": round(seconds, 1)}


def counters(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    def since(name: str) -> int:
        return int(after[name]) - int(before[name])

    all_of = sum(map(sum, after["counts"])) - sum(map(sum, before["counts"]))
    return {
        "remote": round(since("remote_assignments") / all_of, 5),
        "useful_bytes": since("transport_useful_bytes"),
        "bytes": since("transport_bytes"),
    }
