"""Expert offload in the engine: whatever is predicted and whatever gives way, the same tokens."""

from contextlib import closing
from pathlib import Path

import pytest
from offloaded import (
    EXPERT_BYTES,
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
    """Five slots, and a batch that needs five or six experts of ten in a layer: some stream.

    One slot more where nothing is known before the first layer: what it needs would leave no room.
    """
    slots = 6 if predictor == "next_gate" else 5
    warm = {"store": store} if start == "warm" else {}
    memory = (slots + 3) * EXPERT_BYTES
    engine = offloaded(
        model, memory=memory, predictor=predictor, eviction=eviction, prefetch_per_layer=2, **warm
    )
    with closing(engine):
        assert serve(engine, prompts(4)) == resident
        decode = check_counters(engine)
        assert check_pool(engine) == slots
        assert decode["expert_cache_misses"] > 0 < decode["expert_cache_evictions"]
        assert (decode["prefetch_bytes"] > 0) == (predictor != "none")
