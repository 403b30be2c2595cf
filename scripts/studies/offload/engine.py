"""Measures the engine with offloaded experts: greedy tokens, counters, memory, and time on a CPU.

**Requests**: the bundled model answers MT-bench's questions, all at once, at every budget and batch.
**Arrivals**: the engine serves the first requests of the Azure conversation trace under continuous batching,
with lengths and times scaled down. On a CPU a copy is as fast as memory and nothing runs at the same time, so
the times show what the copies and the bookkeeping cost, not what overlap saves.
"""

import gzip
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int
from shared.oracle import Oracle, belady, with_future
from shared.results import few
from shared.text_routing import beginning, collect
from studies.offload.simulator import next_uses
from studies.offload.traces import make_traces, route_windows

from jmoe import LLM, MoEConfig, SamplingParams
from jmoe.config.techniques import OffloadConfig
from jmoe.engine.request import Output, Request
from jmoe.engine.step.inputs import StepInput
from jmoe.engine.step.runner import Runner
from jmoe.engine.step.state import StepOutput
from jmoe.models.journey import StepSettings

PROMPT, NEW, REQUESTS = 64, 32, 16
SHARES = {1: (0.1, 0.25, 0.5, 1.0), 4: (0.25,), 16: (0.25,)}  # shares of the experts, by batch
TRAIN = 32  # windows of each domain in the profile
# pairs of a predictor and an eviction
PAIRS = (
    ("none", "lru"),
    ("none", "lfu"),
    ("counts", "lru"),
    ("expert_map", "expert_map"),
    ("token_table", "expected_use"),
    ("next_gate", "expected_use"),
)
ORACLE = (
    "oracle",
    "belady",
)  # knows what the resident engine needed; its seconds include another compilation
ARRIVALS, SHORTER, SLOWER = 48, 8, 0.05  # requests; lengths divided by; seconds of ours for one of the trace

# for each decode step, the experts that it needs and when each is needed next (``simulator.next_uses``)
Known = Iterator[tuple[Bool[np.ndarray, "L E"], Int[np.ndarray, "L E"]]]


class Bench(NamedTuple):
    """The settings that all runs share.

    model: the model.
    store: file of a profile.
    dry: whether there is only one run of each kind.
    """

    model: str
    store: str
    dry: bool


def measure(data: Path, model: str, dry: bool = False) -> dict[str, Any]:
    """Returns the figures of the ``engine`` part."""
    start, source = time.perf_counter(), collect(model, data / "train", 2 if dry else TRAIN)
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "profile.npz")
        source.profile(source.domains).save(Path(store))
        bench = Bench(model, store, dry)
        questions = _questions(data / "workloads/mt_bench.jsonl.gz")
        return {
            "prompt": PROMPT, "new": NEW, "requests": REQUESTS,
            "runs": _all_at_once(bench, questions),
            "arrivals": _arrivals(bench, data / "workloads"),
            "seconds": round(time.perf_counter() - start),
        }  # fmt: skip


def _questions(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [" ".join(json.loads(line)["turns"]) for line in file]


def _llm(model: str, batch: int, length: int, offload: OffloadConfig | None) -> LLM:
    sizes: dict[str, Any] = {"max_num_seqs": batch, "max_model_len": length, "max_num_batched_tokens": 64}
    sizes["enable_prefix_caching"] = False  # the prompts are sent more than once
    return LLM(model, moe=MoEConfig(offload=offload), dtype="float32", **sizes)


def _all_at_once(bench: Bench, questions: list[str]) -> dict[str, Any]:
    """Returns the figures by batch and by share of experts, predictor and eviction.

    The figures are counters, memory, times, and the number of sequences that equal those of the engine that
    has all experts on the device.
    """
    greedy = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
    found: dict[str, Any] = {}
    for batch, shares in [*SHARES.items()][few(bench.dry)]:
        runs: dict[str, Any] = {}
        wanted: list[list[int]] = []
        needs_NLE = np.zeros(0)
        pairs = PAIRS[few(bench.dry)]
        pairs = (*pairs, ORACLE) if batch == 1 else pairs
        for share, pair in [(None, ("", "")), *itertools.product(shares[few(bench.dry)], pairs)]:
            offload = _offload(share, pair, bench.store)
            with closing(_llm(bench.model, batch, PROMPT + NEW, offload)) as llm:
                subset = questions[: 2 if bench.dry else REQUESTS]
                prompts = [beginning(llm, text, PROMPT) for text in subset]
                if pair == ORACLE:
                    llm.engine.runner = replay(llm.engine.runner, *_known(llm, needs_NLE))
                seconds, tokens = _timed(llm, prompts, greedy)
                name = "resident" if share is None else f"{share:g} {' '.join(pair)}"
                runs[name] = _counters(llm) | {"seconds": round(seconds, 3)}
                if share is None:
                    wanted = tokens
                    needs_NLE = _needs(llm, prompts, tokens) if batch == 1 else needs_NLE
            runs[name]["same"] = sum(a == b for a, b in zip(tokens, wanted, strict=True))
        found[str(batch)] = runs
        print(f"batch {batch}: {sum(r['seconds'] for r in runs.values()):.0f} s", flush=True)
    return found


def _offload(share: float | None, pair: tuple[str, str], store: str) -> OffloadConfig | None:
    """Returns the cache's settings, None if all experts are on the device.

    The oracle gets its own predictor and eviction later.
    """
    if share is None:
        return None
    predictor, eviction = ("none", "lru") if pair == ORACLE else pair
    return OffloadConfig(
        slots_per_layer=max(1, round(32 * share)), predictor=predictor, eviction=eviction, store=store  # pyright: ignore[reportArgumentType]
    )  # fmt: skip


def _needs(llm: LLM, prompts: list[list[int]], tokens: list[list[int]]) -> Bool[np.ndarray, "N L E"]:
    """Returns what each decode step needed. The requests follow one another."""
    model, found = llm.engine.runner.model, []
    for prompt, answer in zip(prompts, tokens, strict=True):
        window = np.array([prompt + answer[:-1]], np.int32)
        found += make_traces(route_windows(model, window), len(prompt), 1)
    return np.concatenate([trace.needs_NLE for trace in found])


def _known(llm: LLM, needs_NLE: Bool[np.ndarray, "N L E"]) -> tuple[Oracle, Known]:
    assert llm.engine.runner.cache is not None
    oracle = Oracle(jnp.zeros(needs_NLE.shape[1:], bool), llm.engine.runner.cache.settings.distance)
    return oracle, zip(needs_NLE, next_uses(needs_NLE), strict=True)


def _timed(llm: LLM, prompts: list[list[int]], greedy: SamplingParams) -> tuple[float, list[list[int]]]:
    start = time.perf_counter()
    outputs = llm.generate(prompts, greedy)
    return time.perf_counter() - start, [o.outputs[0].token_ids for o in outputs]


def _counters(llm: LLM) -> dict[str, Any]:
    """Returns the hits and bytes of both phases, and the bytes of the pool on the device."""
    stats = llm.engine.moe_stats()
    cache = llm.engine.runner.cache
    pool = 0 if cache is None else sum(a.nbytes for a in jax.tree.leaves(cache.pool))
    row: dict[str, Any] = {"pool_bytes": pool}
    for phase in ("prefill", "decode"):
        each = stats[phase]
        hits, misses = each["expert_cache_hits"], each["expert_cache_misses"]
        row[phase] = {
            "hit": round(hits / max(hits + misses, 1), 4),
            "bytes_step": round(each["bytes_host_to_device"] / max(each["steps"], 1)),
            "prefetched": round(each["prefetch_bytes"] / max(each["bytes_host_to_device"], 1), 4),
            "useful": round(each["prefetch_useful_bytes"] / max(each["prefetch_bytes"], 1), 4),
        }
    return row


def _arrivals(bench: Bench, workloads: Path) -> dict[str, Any]:
    """Returns the figures of requests with arrival times.

    The figures are the time to the first token, the time for each further one, and bytes.
    """
    with gzip.open(workloads / "azure_llm_2023_conv.jsonl.gz", "rt", encoding="utf-8") as file:
        trace = [json.loads(line) for _, line in zip(range(2 if bench.dry else ARRIVALS), file, strict=False)]
    with gzip.open(workloads / "domain_prompts.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["prompt"] for line in file]
    rng = np.random.default_rng(0)
    texts = [texts[i] for i in rng.permutation(len(texts))]
    found: dict[str, Any] = {"requests": len(trace), "shorter": SHORTER, "slower": SLOWER, "runs": {}}
    wanted: dict[str, list[int]] | None = None
    cases: dict[str, OffloadConfig | None] = {"resident": None}
    for predictor, eviction in PAIRS[few(bench.dry)]:
        cases[f"{predictor} {eviction}"] = OffloadConfig(
            slots_per_layer=8, predictor=predictor, eviction=eviction, store=bench.store  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
    for name, offload in cases.items():
        with closing(_llm(bench.model, 16, 512, offload)) as llm:
            tokens, row = _replay(llm, trace, texts)
            row |= _counters(llm)
        wanted = tokens if wanted is None else wanted
        found["runs"][name] = row | {"same": sum(wanted[key] == tokens[key] for key in wanted)}
    return found


def _replay(llm: LLM, trace: list[dict[str, Any]], texts: list[str]) -> tuple[dict[str, list[int]], dict]:
    engine, waiting = llm.engine, []
    for i, line in enumerate(trace):
        ids = beginning(llm, texts[i % len(texts)], 256) * 8
        ids = ids[: min(256, max(4, line["input_length"] // SHORTER))]
        new = max(2, line["output_length"] // SHORTER)
        params = SamplingParams(max_tokens=min(new, 128), temperature=0.0, ignore_eos=True, seed=0)
        waiting.append((line["timestamp"] / 1000 * SLOWER, str(i), ids, params))
    times: dict[str, list[float]] = {}

    def note(output: Output) -> None:
        times[output.request_id].append(time.monotonic())

    start, requests = time.monotonic(), []
    while waiting or engine.scheduler.running or engine.scheduler.waiting:
        now = time.monotonic()
        while waiting and waiting[0][0] <= now - start:
            arrives, name, ids, params = waiting.pop(0)
            times[name] = [start + arrives]
            requests.append(Request(name, ids, params, note, now))
            engine.add([requests[-1]])
        if not engine.step():
            time.sleep(0.001)
    firsts = [1e3 * (t[1] - t[0]) for t in times.values()]
    each = [1e3 * (t[-1] - t[1]) / (len(t) - 2) for t in times.values() if len(t) > 2]
    row = {"ttft_ms": round(statistics.median(firsts), 2), "tpot_ms": round(statistics.median(each), 3)}
    return {r.id: r.token_ids for r in requests}, row


def replay(runner: Runner, oracle: Oracle, future: Known) -> Runner:
    """Returns ``runner`` after a change: from now on its forecasts and victims come from ``future``, which an
    earlier run needed."""
    step = runner._step

    def step_with_known(inputs: StepInput, settings: StepSettings) -> StepOutput:
        if inputs.phase == "decode":
            cache = runner.cache
            assert cache is not None
            table, predictor = with_future(cache.table, oracle, *map(jnp.asarray, next(future)))
            predictor = jax.tree.map(jnp.copy, predictor)  # otherwise the step would get the same array twice
            settings_of_cache = cache.settings._replace(rule=belady)
            runner.cache = replace(cache, table=table, predictor=predictor, settings=settings_of_cache)
        return step(inputs, settings)

    runner._step = step_with_known
    return runner
