"""A tiny checkpoint, its profile, and what an engine answers with its experts offloaded."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import hf_tiny
import numpy as np
import pytest

from jmoe.config import MoEConfig
from jmoe.engine.build import EngineSettings, build_engine
from jmoe.engine.engine import Engine
from jmoe.engine.request import Request, SamplingParams
from jmoe.techniques import OffloadConfig
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
    """Of ``count`` prompts; the engine is closed behind them."""
    with closing(engine):
        return serve(engine, prompts(count))


def check_counters(engine: Engine) -> dict:
    """Every copy is accounted for; the decode report."""
    stats = engine.moe_stats()
    for phase in ("prefill", "decode"):
        for layer in stats[phase]["per_layer"]:
            needed = layer["bytes_host_to_device"] - layer["prefetch_bytes"]
            assert needed == layer["expert_cache_misses"] * EXPERT_BYTES
            assert layer["prefetch_useful_bytes"] >= 0
        report = stats[phase]
        assert report["prefetch_useful_bytes"] <= report["prefetch_bytes"]
        mean = (report["expert_cache_hits"] + report["expert_cache_misses"]) / (report["steps"] * LAYERS)
        assert mean == pytest.approx(report["active_experts"])
    assert stats["prefill"]["prefetch_bytes"] == stats["prefill"]["expert_cache_evictions"] == 0
    return stats["decode"]


def check_pool(engine: Engine) -> int:
    """What each slot holds is the store's, bit for bit; how many slots hold one."""
    cache, store = engine.runner.cache, engine.runner.model.store.weights
    assert cache is not None
    held_S, slot_X = np.asarray(cache.table.slots.held_S), np.asarray(cache.table.slots.slot_X)
    assert not np.asarray(cache.table.slots.flying_S).any()
    for slot, flat in enumerate(held_S):
        assert slot_X[flat] == slot
        layer, expert = divmod(int(flat), EXPERTS)
        for pool, stack in (
            (cache.pool.gate_up_E2FD, store.gate_up_E2FD),
            (cache.pool.down_EDF, store.down_EDF),
        ):
            np.testing.assert_array_equal(np.asarray(pool)[slot], np.asarray(stack)[layer, expert])
    return len(held_S)
