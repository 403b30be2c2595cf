"""A request whose activations overflow leaves nothing in an engine with offloaded experts.

Predictors and evictions vary. The overflow is in another row of the batch, in a prompt whose next step has
already begun, or in a decoded token. All other requests' tokens are those of an engine without that request,
and the cache still works.
"""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from support.models import hf_tiny
from support.models.offloaded import (
    EXPERTS,
    GREEDY,
    SETTINGS,
    VOCAB,
    check_counters,
    check_pool,
    serve,
)

from jmoe.config.moe import MoEConfig
from jmoe.config.techniques import OffloadConfig
from jmoe.engine.build import build_engine
from jmoe.engine.engine import Engine
from jmoe.engine.request import Request
from jmoe.placement.profile import Profile
from jmoe.tools.evaluate import evaluate
from jmoe.tools.profile import profile

POISON = VOCAB - 1
rng = np.random.default_rng(0)
HEALTHY = [rng.integers(0, POISON, n).tolist() for n in (12, 7, 19)]
BAD = [*HEALTHY[1][:5], POISON, *HEALTHY[2][:4]]
DRAWN = replace(GREEDY, max_tokens=4, logit_bias=((POISON, 100.0),))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Writes a model in which one token overflows in layer 0.

    A dimension of the embedding is 0 for every other token.
    """
    directory = tmp_path_factory.mktemp("poisoned")
    config = hf_tiny.hf_config(vocab_size=VOCAB, num_local_experts=EXPERTS)
    tensors = hf_tiny.random_tensors(config)
    embed, value = (tensors[f"model.{n}.weight"] for n in ("embed_tokens", "layers.0.self_attn.v_proj"))
    embed[:, 0], embed[POISON] = 0, 0
    embed[POISON, 0] = 1
    value[:, 0], value[0, 0] = 0, 3e38
    hf_tiny.write_checkpoint(directory, config, tensors=tensors)
    hf_tiny.write_tokenizer(directory)
    (directory / "text.txt").write_text("What a request leaves behind it is nobody else's. " * 8)
    return directory


def build(model: Path, moe: MoEConfig, **sizes: int) -> Engine:
    return build_engine(model, replace(SETTINGS, moe=moe, **sizes), warm_up=False)


@pytest.fixture(scope="module")
def want(model: Path) -> list[list[int]]:
    with closing(build(model, MoEConfig())) as engine:
        return serve(engine, HEALTHY)


def run_with_healthy(engine: Engine, prompt: list[int], params: Any) -> tuple[str | None, list[list[int]]]:
    """Returns the error of one request, and the answers of the healthy requests that run with it."""
    errors: list[str | None] = []
    bad = Request("bad", prompt, params, lambda output: errors.append(output.error), 0.0)
    mates = [Request(str(i), p, GREEDY, lambda output: None, 0.0) for i, p in enumerate(HEALTHY)]
    engine.run([mates[0], bad, *mates[1:]])
    return errors[-1], [mate.token_ids for mate in mates]


def cache_counts(engine: Engine) -> tuple[int, int]:
    decode = engine.moe_stats()["decode"]
    return decode["expert_cache_misses"], decode["expert_cache_evictions"]


def check_nothing_is_left(engine: Engine, want: list[list[int]], groups: int = 1) -> None:
    for _ in range(2):
        assert serve(engine, HEALTHY) == want
    start = np.array(cache_counts(engine))
    assert serve(engine, HEALTHY) == want
    before = np.array(cache_counts(engine)) - start
    for prompt, params in ((HEALTHY[1], DRAWN), (BAD, GREEDY), (BAD[:6], GREEDY)):
        error, mates = run_with_healthy(engine, prompt, params)
        assert error == "the model produced NaN logits"
        assert mates == want
    start = np.array(cache_counts(engine))
    assert serve(engine, HEALTHY) == want
    after = np.array(cache_counts(engine)) - start
    assert (after > 0).all() and (after < 2 * before).all(), (before, after)
    check_counters(engine, groups)
    check_pool(engine)
    assert engine.runner.cache is not None
    kept = jax.tree.leaves((engine.runner.cache.table, engine.runner.cache.predictor))
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in kept)


PREDICTORS = ("none", "counts", "next_gate", "expert_map", "token_table")
QUICK = {("next_gate", "expected_use", "graph"), ("expert_map", "expected_use", "host")}
# Each eviction that reads a forecast meets each predictor; lru and lfu read none. Each predictor and each
# eviction meets each executor.
CASES = [
    *((each, "expected_use", ("graph", "host")[i % 2]) for i, each in enumerate(PREDICTORS)),
    *((each, "expert_map", ("host", "graph")[i % 2]) for i, each in enumerate(PREDICTORS)),
    *(("counts", "lru", "graph"), ("token_table", "lru", "host")),
    *(("counts", "lfu", "host"), ("token_table", "lfu", "graph")),
]


@pytest.mark.parametrize(
    ("predictor", "eviction", "executor"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.matrix) for case in CASES],
)
def test_every_pair_of_predictor_eviction_and_executor(
    model: Path, store: str, want, predictor, eviction, executor
):
    """There are as many slots as a step of one group can need, so the graph compiles no way to stream."""
    warm: dict[str, Any] = {"store": store} if predictor == "token_table" else {}
    warm |= {} if predictor == "none" else {"prefetch_per_layer": 2}
    offload = OffloadConfig(
        slots_per_layer=5,
        predictor=predictor,
        eviction=eviction,
        executor=executor,
        **warm,
    )
    with closing(build(model, MoEConfig(offload=offload))) as engine:
        check_nothing_is_left(engine, want)


@pytest.mark.parametrize(
    ("shape", "transport"),
    [
        pytest.param((1, 2, 1), "replicated", marks=pytest.mark.matrix),
        ((2, 2, 1), "ragged_all_to_all"),
    ],
    ids=str,
)
def test_meshes(model: Path, want, shape: tuple[int, int, int], transport):
    axes = ("data_parallel_size", "expert_parallel_size", "tensor_parallel_size")
    offload = OffloadConfig(slots_per_layer=3, predictor="next_gate", prefetch_per_layer=2)
    moe = MoEConfig(transport=transport, offload=offload)
    with closing(build(model, moe, **dict(zip(axes, shape, strict=True)))) as engine:
        check_nothing_is_left(engine, want, groups=shape[0])


@pytest.mark.parametrize("executor", ["graph", pytest.param("host", marks=pytest.mark.matrix)])
def test_an_assignment_that_no_expert_got_ends_its_requests_and_is_reported(
    model: Path, want, executor, caplog
):
    """The two halves of the slot table are made to differ: an expert lies where nobody looks for it."""
    offload = OffloadConfig(slots_per_layer=EXPERTS, predictor="none", executor=executor)
    with closing(build(model, MoEConfig(offload=offload))) as engine:
        assert serve(engine, HEALTHY) == want
        cache = engine.runner.cache
        assert cache is not None
        slots = cache.table.slots
        crossed = slots._replace(held_S=slots.held_S[::-1])
        engine.runner.cache = replace(cache, table=cache.table._replace(slots=crossed))
        error, _ = run_with_healthy(engine, HEALTHY[0], GREEDY)
        assert error is not None and "assignments to experts were not computed" in error
        stats = engine.moe_stats()
        assert stats["prefill"]["lost_assignments"] + stats["decode"]["lost_assignments"] > 0
        assert any("fault of the engine" in record.message for record in caplog.records)


def test_eval_and_profile_of_a_text_that_overflows(model: Path, tmp_path: Path):
    """A loss is refused; a profile leaves the window out, says so, and holds only numbers."""
    text, out = tmp_path / "bad.txt", tmp_path / "profile.npz"
    text.write_text(
        "a window that is well\n<|endoftext|>\na soft hyphen\u00ad is token 255", encoding="utf-8"
    )
    for mode in ("prefill", "decode"):
        with pytest.raises(ValueError, match=r"NaN logits for \d+ of \d+ tokens"):
            evaluate(str(model), [text], mode=mode, batch_size=2, settings=SETTINGS)
    report = profile(str(model), [text], out, batch_size=2, settings=SETTINGS)
    assert report["windows"] == 2 and report["overflown_windows"] == 1
    assert Profile.load(out).tokens == len("a window that is well") == report["tokens"]
    text.write_text("soft\u00adhyphen", encoding="utf-8")
    with pytest.raises(ValueError, match="activations of every window overflow"):
        profile(str(model), [text], out, batch_size=2, settings=SETTINGS)
