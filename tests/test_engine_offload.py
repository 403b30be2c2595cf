"""Expert offload in the engine: whatever is predicted and whatever gives way, the same tokens."""

from contextlib import closing
from pathlib import Path

import pytest
from offloaded import (
    LAYERS,
    answers,
    build,
    check_counters,
    check_pool,
    offloaded,
    prompts,
    serve,
    write_model,
    write_profile,
)

WARM_OR_COLD = {
    "expert_map": ("cold", "warm", "warm"),
    "next_gate": ("cold", "cold", "cold"),
    "token_table": ("warm", "warm", "warm"),
    "counts": ("warm", "cold", "cold"),
    "none": ("cold", "cold", "cold"),
}
PAIRS = [
    (name, rule, start)
    for name, starts in WARM_OR_COLD.items()
    for rule, start in zip(("expert_map", "lru", "lfu"), starts, strict=True)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def store(model: Path) -> str:
    return write_profile(model)


@pytest.fixture(scope="module")
def resident(model: Path) -> list[list[int]]:
    """The answers with all experts on the device."""
    return answers(build(model))


@pytest.mark.parametrize(("predictor", "eviction", "start"), PAIRS)
def test_every_predictor_and_eviction_gives_the_resident_tokens(
    model: Path, store: str, resident, predictor: str, eviction: str, start: str
):
    """Three slots a layer, and a batch that needs about six experts of ten: some stream."""
    warm = {"store": store} if start == "warm" else {}
    engine = offloaded(
        model, slots_per_layer=3, predictor=predictor, eviction=eviction, prefetch_per_layer=2, **warm
    )
    with closing(engine):
        assert serve(engine, prompts(4)) == resident
        decode = check_counters(engine)
        assert check_pool(engine) == 3 * LAYERS
        assert decode["expert_cache_misses"] > 0 < decode["expert_cache_evictions"]
        assert (decode["prefetch_bytes"] > 0) == (predictor != "none")
