"""A tiny checkpoint, its profile, and what an engine with offloaded experts answers."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from support.models import hf_tiny

from jmoe.config.moe import MoEConfig
from jmoe.config.techniques import OffloadConfig
from jmoe.engine.build import build_engine
from jmoe.engine.deployment.settings import EngineSettings
from jmoe.engine.engine import Engine
from jmoe.engine.request import Request, SamplingParams
from jmoe.mesh import DATA, EXPERT
from jmoe.tools.profile import profile

LAYERS, EXPERTS, K, VOCAB = 2, 10, 2, 256
HIDDEN, INNER = 32, 16
EXPERT_BYTES = 3 * HIDDEN * INNER * 4  # float32
SETTINGS = EngineSettings(
    max_model_len=64, dtype="float32", max_num_seqs=4, max_num_batched_tokens=64, kv_memory=1 << 20
)
GREEDY = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
TEXT = "Seven slots hold the experts of two layers, and whatever is asked for next gives way last. " * 8


def write_model(directory: Path, layers: int = LAYERS) -> Path:
    config = hf_tiny.hf_config(num_hidden_layers=layers, vocab_size=VOCAB, num_local_experts=EXPERTS)
    hf_tiny.write_checkpoint(directory, config)
    hf_tiny.write_tokenizer(directory)
    (directory / "text.txt").write_text(TEXT)
    return directory


def write_profile(model: Path) -> str:
    out = model / "profile.npz"
    profile(str(model), [model / "text.txt"], out, batch_size=4, settings=SETTINGS)
    return str(out)


def prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(count)
    return [rng.integers(0, VOCAB, int(rng.integers(1, 20))).tolist() for _ in range(count)]


def build(model: Path, moe: MoEConfig = MoEConfig(), *, warm_up: bool = False, **changes) -> Engine:
    return build_engine(model, replace(SETTINGS, moe=moe, **changes), warm_up=warm_up)


def offloaded(model: Path, moe: MoEConfig = MoEConfig(), *, seqs: int = 4, **offload) -> Engine:
    return build(model, replace(moe, offload=OffloadConfig(**offload)), max_num_seqs=seqs)


def serve(engine: Engine, given: list[list[int]], params: SamplingParams = GREEDY) -> list[list[int]]:
    requests = [Request(str(i), p, params, lambda output: None, 0.0) for i, p in enumerate(given)]
    engine.run(requests)
    return [r.token_ids for r in requests]


def answers(engine: Engine, count: int = 4) -> list[list[int]]:
    """Returns the answers to ``count`` prompts, and closes the engine."""
    with closing(engine):
        return serve(engine, prompts(count))


def check_counters(engine: Engine, groups: int = 1) -> dict:
    """Checks that every copy is accounted for, and returns the decode report.

    groups: number of groups of data, each with its own pools; all of them may need an expert to which tokens
        of several groups go.
    """
    stats = engine.moe_stats()
    for phase in ("prefill", "decode"):
        assert stats[phase]["lost_assignments"] == 0 < stats[phase]["assignments"]
        for layer in stats[phase]["per_layer"]:
            needed = layer["bytes_host_to_device"] - layer["prefetch_bytes"]
            assert needed == layer["expert_cache_misses"] * EXPERT_BYTES
            assert layer["prefetch_useful_bytes"] >= 0
        report = stats[phase]
        assert report["prefetch_useful_bytes"] <= report["prefetch_bytes"]
        mean = (report["expert_cache_hits"] + report["expert_cache_misses"]) / (report["steps"] * LAYERS)
        assert (
            mean == pytest.approx(report["active_experts"]) or 1 < mean / report["active_experts"] <= groups
        )
    assert stats["prefill"]["prefetch_bytes"] == stats["prefill"]["expert_cache_evictions"] == 0
    return stats["decode"]


def check_pool(engine: Engine, experts: int = EXPERTS) -> int:
    """Checks that every slot of every rank holds the store's expert, bit for bit; returns their number.

    experts: experts of a layer of the engine's model.
    """
    cache, store, mesh = engine.runner.cache, engine.runner.model.store.weights, engine.runner.mesh
    assert cache is not None
    ranks, held = mesh.shape[DATA] * mesh.shape[EXPERT], experts // mesh.shape[EXPERT]
    slots = jax.tree.map(lambda a: np.asarray(a).reshape(ranks, -1), cache.table.slots)
    pool = jax.tree.map(lambda a: np.asarray(a).reshape(ranks, -1, *a.shape[1:]), cache.pool)
    assert not slots.flying_S.any()
    for rank, held_S in enumerate(slots.held_S):
        for slot, flat in enumerate(held_S):
            assert slots.slot_X[rank, flat] == slot
            layer, expert = divmod(int(flat), held)
            expert += rank % mesh.shape[EXPERT] * held
            for ours, stack in zip(jax.tree.leaves(pool), jax.tree.leaves(store), strict=True):
                np.testing.assert_array_equal(ours[rank, slot], np.asarray(stack)[layer, expert])
    return slots.held_S.size
