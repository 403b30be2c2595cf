"""The Hopper grouped MLP compiles for H100 and H200 at real sizes, with wgmma and TMA and without spills."""

import pytest
from support.aot import gpu as gpu_aot

MODELS = {
    "Qwen3-30B-A3B": {"experts": 128, "inner": 768, "model": 2048},
    "OLMoE": {"experts": 64, "inner": 1024, "model": 2048},
    "Mixtral-8x7B": {"experts": 8, "inner": 14336, "model": 4096},
    "DeepSeek-V2-Lite": {"experts": 64, "inner": 1408, "model": 2048},
}
H200, H100 = gpu_aot.TARGETS
# An H100 gets the blocks of an H200 (``blocks.TABLE``), so one model shows that its compiler takes them.
SHAPES = [(H200, name) for name in MODELS] + [(H100, "Mixtral-8x7B")]
CASES = {
    f"{name}, {rows} rows per expert, {device}": dict(
        MODELS[name], device=device, rows=rows * MODELS[name]["experts"]
    )
    for device, name in SHAPES
    for rows in (2, 512)
}
CASES["wider decode windows"] = dict(MODELS["OLMoE"], device=H200, rows=48 * 64)
CASES["over 8 devices"] = dict(MODELS["Qwen3-30B-A3B"], device=H200, rows=256, shards=8)
for activation in ("swiglu_oai", "gelu_tanh", "relu"):
    sizes = {"experts": 32, "inner": 2880, "model": 2880, "rows": 64}
    CASES[f"biases, {activation}"] = {**sizes, "device": H200, "biases": True, "activation": activation}
REFUSED = {"experts": 8, "inner": 96, "model": 128, "device": H200, "rows": 8}

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(gpu_aot.missing() is not None, reason=str(gpu_aot.missing())),
]


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict]:
    results = gpu_aot.compile_cases([*CASES.values(), REFUSED])
    return dict(zip([*CASES, "refused"], results, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_compiles_to_tensor_cores_and_tma_without_spills(name: str, compiled: dict[str, dict]):
    assert "error" not in compiled[name], compiled[name]["error"]
    assert sum(n for target, n in compiled[name]["calls"].items() if target.startswith("mosaic_gpu")) == 2
    for kernel in compiled[name]["kernels"]:
        assert kernel["wgmma"] and kernel["tma"] and kernel["spill_bytes"] == 0, kernel
        assert kernel["smem_bytes"] <= 227 * 1024, kernel


@pytest.mark.parametrize("model", MODELS)
def test_kernels_are_chosen_by_rows_an_expert(model: str, compiled: dict[str, dict]):
    for rows, kind in ((2, "decode"), (512, "prefill")):
        names = {k["name"] for k in compiled[f"{model}, {rows} rows per expert, {H200}"]["kernels"]}
        assert names == {f"jmoe_{kind}_{part}_mosaic_gpu_kernel" for part in ("gate_up", "down")}


def test_a_named_limit_is_the_error(compiled: dict[str, dict]):
    assert "inner dimension must be a multiple of 64, got 96" in compiled["refused"]["error"]
