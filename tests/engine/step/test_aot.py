"""The engine's prefill and decode steps compile for TPUs and GPUs, with the kernels meant for them."""

import importlib.util
from pathlib import Path

import pytest
from shared import tpu_compiler as tpu_aot
from support.aot import gpu as gpu_aot
from support.aot.steps import QWEN, check

ROOT = Path(__file__).parents[3]
LAYERS = 2
pytestmark = pytest.mark.aot
needs_gpu_compiler = pytest.mark.skipif(gpu_aot.missing() is not None, reason=str(gpu_aot.missing()))
needs_tpu_compiler = pytest.mark.skipif(tpu_aot.why_not() is not None, reason=str(tpu_aot.why_not()))
needs_cudnn = pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.cudnn") is None,
    reason="cuDNN is not installed (nvidia-cudnn-cu13)",
)


@pytest.fixture(scope="module")
def on_gpu() -> dict[str, dict]:
    h200, *_ = gpu_aot.TARGETS
    steps = {"decode": (16, 1, [1, 4, 1]), "prefill": (1, 512, [1, 1, 1])}
    cases = [
        {"device": h200, "config": str(QWEN), "layers": LAYERS, "mesh": mesh, "sequences": b, "tokens": t}
        for b, t, mesh in steps.values()
    ]
    return dict(zip(steps, gpu_aot.compile_cases(cases), strict=True))


@needs_gpu_compiler
def test_four_gpus_decode_with_pallas_experts_and_paged_attention(on_gpu: dict[str, dict]):
    assert "error" not in on_gpu["decode"], on_gpu["decode"]["error"]
    calls = on_gpu["decode"]["calls"]
    assert sum(n for target, n in calls.items() if target.startswith("mosaic_gpu")) == 2 * LAYERS
    assert calls["__gpu$xla.gpu.triton"] == LAYERS  # jax's paged attention
    assert on_gpu["decode"]["temporary"] < 1 << 28


@needs_gpu_compiler
@needs_cudnn
def test_a_gpu_prefills_with_pallas_experts_and_cudnn(on_gpu: dict[str, dict]):
    assert "error" not in on_gpu["prefill"], on_gpu["prefill"]["error"]
    calls = on_gpu["prefill"]["calls"]
    assert sum(n for target, n in calls.items() if target.startswith("mosaic_gpu")) == 2 * LAYERS
    assert sum(n for target, n in calls.items() if target.startswith("__cudnn$fmha")) == LAYERS


SLICE = ("--slice", "v6e:2x4", "--mesh", "1x4x2", "--layers", str(LAYERS))


@pytest.fixture(scope="module")
def on_tpu() -> list[dict]:
    status, rows = check("--model", str(QWEN), *SLICE)
    assert status == 0, rows
    return rows


@needs_tpu_compiler
def test_a_tpu_slice_compiles_both_steps_and_they_fit(on_tpu: list[dict]):
    assert [row["step"] for row in on_tpu] == ["decode 16 a rank", "prefill 512 a rank"]
    for row in on_tpu:
        assert row["verdict"] == "fits" and 0 < row["resident_gb"] < 4 and row["temporary_gb"] < 1


@needs_tpu_compiler
def test_bytes_between_chips_are_those_of_the_transport(on_tpu: list[dict]):
    """At least the gathered rows and the scattered outputs of every layer move, over 4 expert ranks."""
    for row, tokens in zip(on_tpu, (16, 512 + 16), strict=True):
        moe = LAYERS * 3 * tokens * 2048 * (2 + 4)
        assert moe <= row["sent_mb"] * 1e6 <= 8 * moe, row


@needs_tpu_compiler
@pytest.mark.matrix
def test_attention_over_the_experts_ranks_scatters_instead_of_reducing_all():
    """Heads lie over 4 expert ranks: each half layer gathers a prompt's rows once and scatters them once.

    A chip sends 3/4 of the rows each time: bfloat16 to attention and to the experts, float32 back. Reducing
    all and slicing would send attention's sums twice. Shuffling adds one kind of collective: the residual's
    own quarter moves in float32 before each layer's experts, and returns after the last layer; the compiler's
    text has all of it, as it cannot know which rows stay. In the same step 16 sequences are decoded, 132 rows
    a chip in total, which the compiler rounds up to 144 before it scatters.
    """
    moe = '{"shuffle": {"placement": "unread"}}'
    where = ("--slice", "v6e:2x2", "--mesh", "1x4x1", "--layers", str(LAYERS), "--attention", "tp")
    status, [prefill] = check("--model", str(QWEN), *where, "--moe-config", moe, "--step", "prefill")
    assert status == 0, prefill
    tokens = 512 + 16
    once = LAYERS * tokens * 2048 * 3 / 4
    kinds = {kind: sent for kind, (_, sent) in prefill["by_kind"].items()}
    assert kinds["reduce-scatter"] == pytest.approx(once * (4 + 4) * 144 / 132, rel=0.02), prefill
    assert kinds["all-gather"] == pytest.approx(once * (2 + 2), rel=0.02), prefill
    assert kinds.get("all-reduce", 0) < 0.1 * once, prefill  # only rows after which tokens are sampled
    moves = LAYERS + 1
    assert prefill["by_kind"]["ragged-all-to-all"] == [moves, moves * (tokens // 4) * 2048 * 4 * 3 // 4]


@needs_tpu_compiler
@pytest.mark.matrix
@pytest.mark.parametrize("model", ["deepseek-v2-lite", "gpt-oss-20b"])
def test_other_families_steps_compile_for_a_v5e_slice(model: str):
    """One has a dense layer, latent attention, a shared expert; the other sinks, windows, expert biases."""
    where = ("--slice", "v5e:2x4", "--mesh", "1x8x1", "--sequences", "8", "--layers", str(LAYERS))
    status, rows = check("--model", str(ROOT / f"configs/model/{model}.toml"), *where)
    assert status == 0 and [row["verdict"] for row in rows] == ["fits", "fits"], rows


@needs_tpu_compiler
def test_a_binned_decode_step_sums_votes_once_a_layer(on_tpu: list[dict]):
    """The sum is over four expert ranks, between the two calls of the kernel."""
    binned = ("--moe-config", '{"binning": {}}', "--step", "decode")
    status, [decode] = check("--model", str(QWEN), *SLICE, *binned)
    assert status == 0, decode
    plain = on_tpu[0]["by_kind"].get("all-reduce", (0, 0))
    assert decode["by_kind"]["all-reduce"][0] - plain[0] == LAYERS, (decode, plain)


@needs_tpu_compiler
def test_what_does_not_fit_a_chip_fails():
    """Six layers of Mixtral have 17 GB of weights; a v5e chip has 16 GB."""
    where = ("--slice", "v5e:2x2", "--mesh", "1x1x1", "--layers", "6", "--sequences", "1", "--step", "decode")
    status, [row] = check("--model", str(ROOT / "configs/model/mixtral-8x7b.toml"), *where)
    assert status == 1
    assert "memory" in row["verdict"] or row["verdict"] == "DOES NOT FIT", row
