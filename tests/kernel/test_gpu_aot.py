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
ROW_INT8, GROUPED_INT4 = {"code": "int8", "group": None}, {"code": "int4", "group": 32, "scales": "bfloat16"}
GROUPED_INT8, ROW_INT4 = {"code": "int8", "group": 32}, {"code": "int4", "group": None}
E4M3, MXFP4 = {"code": "e4m3", "group": 128}, {"code": "e2m1", "group": 32, "scales": "uint8"}
QWEN3, DEEPSEEK_V3 = MODELS["Qwen3-30B-A3B"], {"experts": 32, "inner": 2048, "model": 7168}
GPT_OSS = {"experts": 32, "inner": 2880, "model": 2880, "biases": True, "activation": "swiglu_oai"}
FEW_ROWS = {
    "Qwen3, int4, 8 rows, 8 devices": dict(QWEN3, codings=[GROUPED_INT4] * 2, rows=8 * 128, shards=8),
    "DeepSeek-V3, e4m3, 2 rows": dict(DEEPSEEK_V3, codings=[E4M3] * 2, rows=2 * 32),
    "Qwen3, int8 rows": dict(QWEN3, codings=[GROUPED_INT8, ROW_INT4], rows=256, activations="int8"),
    "gpt-oss, MXFP4, 2 rows": dict(GPT_OSS, codings=[MXFP4] * 2, rows=2 * 32, device=H100),
}
MORE = {  # in the long part
    "Qwen3, int8, 1 row": dict(QWEN3, codings=[ROW_INT8] * 2, rows=128),
    "DeepSeek-V3, e4m3, 256 rows": dict(DEEPSEEK_V3, codings=[E4M3] * 2, rows=256 * 32),
    "gpt-oss, int4 with lows, 256 rows": dict(
        GPT_OSS, codings=[GROUPED_INT4 | {"has_lows": True}] * 2, rows=256 * 32
    ),
}
CASES |= {name: {"device": H200, **case} for name, case in FEW_ROWS.items()}
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
    check_kernels(compiled[name])


@pytest.mark.matrix
def test_more_forms_of_weights_compile_without_spills():
    for found in gpu_aot.compile_cases([{"device": H200, **case} for case in MORE.values()]):
        assert "error" not in found, found["error"]
        check_kernels(found)


def check_kernels(found: dict) -> None:
    for kernel in found["kernels"]:
        assert kernel["wgmma"] and kernel["tma"] and kernel["spill_bytes"] == 0, kernel
        assert kernel["smem_bytes"] <= 227 * 1024, kernel


def test_int8_rows_take_sums_of_int8(compiled: dict[str, dict]):
    assert [kernel["wgmma"] for kernel in compiled["Qwen3, int8 rows"]["kernels"]] == [["m64n16k32"]] * 2


@pytest.mark.parametrize("name", FEW_ROWS)
def test_quantised_weights_are_copied_nowhere(name: str, compiled: dict[str, dict]):
    case = CASES[name]
    numbers = 3 * case["experts"] * case["inner"] * case["model"] // case.get("shards", 1)
    assert compiled[name]["temporary"] < 0.3 * numbers, "half a byte a number is the least form of them"


@pytest.mark.parametrize("model", MODELS)
def test_kernels_are_chosen_by_rows_an_expert(model: str, compiled: dict[str, dict]):
    for rows, kind in ((2, "decode"), (512, "prefill")):
        names = {k["name"] for k in compiled[f"{model}, {rows} rows per expert, {H200}"]["kernels"]}
        assert names == {f"jmoe_{kind}_{part}_mosaic_gpu_kernel" for part in ("gate_up", "down")}


def test_a_named_limit_is_the_error(compiled: dict[str, dict]):
    assert "inner dimension must be a multiple of 64, got 96" in compiled["refused"]["error"]
