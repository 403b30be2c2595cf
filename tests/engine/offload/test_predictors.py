"""With expert offload, the tokens are the same, whatever is predicted or evicted."""

from contextlib import closing
from pathlib import Path

import pytest
from support.models.offloaded import (
    EXPERT_BYTES,
    answers,
    build,
    check_counters,
    check_pool,
    offloaded,
    prompts,
    serve,
)

CASES = [  # every predictor and every eviction once; test_poison.py has them in pairs, without streaming
    ("none", "lru", "cold"), ("counts", "lfu", "warm"), ("next_gate", "expected_use", "cold"),
    ("expert_map", "expert_map", "cold"), ("token_table", "expected_use", "warm"),
]  # fmt: skip


@pytest.fixture(scope="module")
def resident(model: Path) -> list[list[int]]:
    """Returns the answers of an engine with all experts on the device."""
    return answers(build(model))


@pytest.mark.matrix
@pytest.mark.parametrize(("predictor", "eviction", "start"), CASES)
def test_every_predictor_and_eviction_gives_the_resident_tokens(
    model: Path, store: str, resident, predictor: str, eviction: str, start: str
):
    """There are five slots, and a batch needs five or six experts of ten in a layer, so some stream.

    There is one slot more if nothing is known before the first layer: what it needs would leave no room.
    """
    slots = 6 if (predictor, start) == ("next_gate", "cold") else 5
    warm = {"store": store} if start == "warm" else {}
    warm |= {} if predictor == "none" else {"prefetch_per_layer": 2}
    memory = (slots + 3) * EXPERT_BYTES
    engine = offloaded(model, memory=memory, predictor=predictor, eviction=eviction, **warm)
    with closing(engine):
        assert serve(engine, prompts(4)) == resident
        decode = check_counters(engine)
        assert check_pool(engine) == slots
        assert decode["expert_cache_misses"] > 0 < decode["expert_cache_evictions"]
        assert (decode["prefetch_bytes"] > 0) == (predictor != "none")
