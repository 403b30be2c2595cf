"""The binning kernels compile for TPUs and GPUs, and take a small part of a layer's time."""

import pytest
from shared import tpu_compiler as tpu_aot
from support.aot import binning as binning_aot
from support.aot import gpu as gpu_aot

H200 = "NVIDIA H200"
SHAPES = [{"tokens": t, "experts": e, "k": 8} for t in (16, 64) for e in (64, 128, 256)]
CLOCKS = {"v5e": (1.5e9, 819e9), "v5p": (1.75e9, 2765e9), "v6e": (1.75e9, 1640e9)}  # Hz, bytes/s
EXPERT_BYTES = 3 * 768 * 2048 * 2  # an expert of Qwen3-30B-A3B in bfloat16

pytestmark = pytest.mark.aot
on_tpu = pytest.mark.skipif(tpu_aot.why_not() is not None, reason=str(tpu_aot.why_not()))
on_gpu = pytest.mark.skipif(gpu_aot.missing() is not None, reason=str(gpu_aot.missing()))


def results(first: str, *others: str) -> list[tuple[dict, dict]]:
    """Returns (case, its compiled result).

    The first device has every shape alone, and one over eight devices, whose votes are summed. The kernel is
    the same for the others of its family, which have the shapes of which ``CLOCKS`` gives a share of a layer.
    """
    cases = [dict(shape, device=first, shards=1) for shape in SHAPES]
    cases += [
        dict(shape, device=each, shards=1) for each in others for shape in SHAPES if shape["experts"] == 128
    ]
    cases.append({"tokens": 16, "experts": 128, "k": 8, "device": first, "shards": 8})
    return list(zip(cases, binning_aot.compile_cases(cases), strict=True))


@pytest.fixture(scope="module")
def tpu() -> list[tuple[dict, dict]]:
    return results(*CLOCKS)


@on_tpu
def test_compiles_for_tpus_alone_and_over_eight(tpu: list[tuple[dict, dict]]):
    for case, kernels in tpu:
        names = {"bin_experts"} | ({"bin_experts_votes"} if case["shards"] > 1 else set())
        assert set(kernels) == names, (case, kernels)
        assert all(kernel["vmem"] < 4 << 20 for kernel in kernels.values()), (case, kernels)


@on_tpu
def test_costs_little_of_a_decode_layer(tpu: list[tuple[dict, dict]]):
    """The kernel takes a small part of the time in which a layer reads the active experts.

    Half of the experts that even routing reaches count as active.
    """
    for case, kernels in tpu:
        if case["experts"] != 128 or case["shards"] > 1:
            continue
        clock, bandwidth = CLOCKS[case["device"]]
        active = 128 * (1 - (1 - 8 / 128) ** case["tokens"]) / 2
        share = kernels["bin_experts"]["cycles"] / clock / (active * EXPERT_BYTES / bandwidth)
        print(f"{case['device']}, {case['tokens']} tokens: {kernels} {share:.1%} of the layer")
        assert share < 0.05, (case, kernels)


@on_gpu
def test_compiles_for_an_h200_without_spills():
    for case, kernels in results(H200):
        assert "bin_experts" in kernels and len(kernels) == (1 if case["shards"] == 1 else 2), (case, kernels)
        print(case, kernels)
        for kernel in kernels.values():
            assert kernel.get("spill_bytes", 0) == 0, (case, kernels)
