"""Compiles offloaded steps for a TPU: memory of the experts, and copies that run during compute."""

import json
import tomllib

import pytest
from shared import tpu_compiler as tpu_aot
from support.aot.steps import QWEN, check

LAYERS, SLOTS, COPIES = 2, 32, 1  # slots and prefetches a layer
CFG = tomllib.loads(QWEN.read_text())
STACKS = 2  # gate and up in one stack, down in the other: one copy each
EXPERT = 3 * CFG["hidden_size"] * CFG["moe_intermediate_size"] * 2  # bytes, bfloat16
WHERE = ("--model", str(QWEN), "--slice", "v5e:2x2", "--mesh", "1x1x1", "--layers", str(LAYERS))
pytestmark = [
    pytest.mark.aot,
    pytest.mark.matrix,  # two and a half minutes
    pytest.mark.skipif(tpu_aot.why_not() is not None, reason=str(tpu_aot.why_not())),
]


def rows(**offload) -> list[dict]:
    """Returns the rows of the decode step, 16 sequences, and of the prefill step, 512 tokens."""
    status, found = check(*WHERE, "--moe-config", json.dumps({"offload": offload} if offload else {}))
    assert status == 0, found
    return found


@pytest.fixture(scope="module")
def resident() -> list[dict]:
    return rows()


@pytest.fixture(scope="module")
def offloaded() -> list[dict]:
    """Returns the rows of the steps with the predictor that has a store; the mesh below has ``next_gate``."""
    return rows(slots_per_layer=SLOTS, predictor="expert_map", prefetch_per_layer=COPIES)


def test_experts_are_the_hosts_and_the_pool_is_the_devices(resident: list[dict], offloaded: list[dict]):
    """All memory that the device saves is accounted for, apart from a store of past iterations."""
    everything = LAYERS * CFG["num_experts"] * EXPERT
    pool = (LAYERS * SLOTS + 1) * EXPERT  # the slots and the one that nobody reads
    store = 1000 * 4 * (CFG["hidden_size"] + LAYERS * (CFG["num_experts"] + 1))
    for plain, ours in zip(resident, offloaded, strict=True):
        assert plain["bytes"]["host"] == 0 and ours["bytes"]["host"] == everything
        more = ours["bytes"]["resident"] - (plain["bytes"]["resident"] - everything)
        assert pool <= more <= pool + 1.5 * store
        # copies in flight, and the kernel over streamed experts in addition to the one over the pool
        assert ours["bytes"]["temporary"] - plain["bytes"]["temporary"] < 6 * EXPERT, ours


def test_prefetches_run_while_the_experts_compute(offloaded: list[dict]):
    """A layer's prefetches begin before its experts' kernel and are awaited after it."""
    entry = offloaded[0]["host_copies"]["entry"]
    kernels = [i for i, event in enumerate(entry) if event == "grouped_mlp_decode"]
    assert len(kernels) == LAYERS
    spans = [
        (entry.index(event), entry.index(event.replace("start", "done")))
        for event in entry
        if event.startswith("start")
    ]
    assert len(spans) == STACKS * COPIES * (1 + LAYERS), "those before the first layer, and each layer's"
    for kernel in kernels:
        assert sum(start < kernel < done for start, done in spans) == STACKS * COPIES, entry


def test_what_is_missing_comes_in_loops(offloaded: list[dict]):
    """A loop makes one turn for each expert.

    A prompt's step has one kind of loop only, because it fills no slots.
    """
    decode, prefill = offloaded
    for row, fills in ((decode, LAYERS), (prefill, 0)):
        bodies = [events for name, events in row["host_copies"].items() if name != "entry"]
        alone = ["start 0", "start 1", "done 1", "done 0"]
        assert sorted(map(len, bodies)) == [len(alone)] * fills + [len(alone) + 1] * LAYERS, row
        for events in bodies:
            assert sorted(events[: len(alone)]) == sorted(alone)
            assert all(event.startswith("grouped_mlp") for event in events[len(alone) :])
    assert "entry" not in prefill["host_copies"]


def test_every_rank_of_a_mesh_has_its_own_experts_and_prefetches_meanwhile():
    """Host memory, pool and prefetches belong to a rank; a few kilobytes move between ranks for them."""
    where = (*WHERE[:4], "--mesh", "1x4x1", *WHERE[6:], "--step", "decode")
    offload = {"slots_per_layer": SLOTS // 4, "predictor": "next_gate", "prefetch_per_layer": COPIES}
    (status, [plain]), (ours_status, [ours]) = (
        check(*where, "--moe-config", json.dumps({"offload": each} if each else {})) for each in ({}, offload)
    )
    assert status == ours_status == 0, ours
    held = LAYERS * CFG["num_experts"] // 4 * EXPERT
    pool = (LAYERS * SLOTS // 4 + 1) * EXPERT
    assert plain["bytes"]["host"] == 0 and ours["bytes"]["host"] == held
    assert ours["bytes"]["resident"] - (plain["bytes"]["resident"] - held) < pool + (1 << 20)
    entry = ours["host_copies"]["entry"]
    kernels = [i for i, event in enumerate(entry) if event == "grouped_mlp_decode"]
    done = {e: entry.index(e.replace("start", "done")) for e in entry if e.startswith("start")}
    for kernel in kernels:
        assert sum(entry.index(e) < kernel < at for e, at in done.items()) == STACKS * COPIES, entry
    assert ours["sent_mb"] - plain["sent_mb"] < 1
