"""The TPU kernels through the TPU compiler at real layer sizes: they compile, fit VMEM and keep up with HBM."""

import pytest
import tpu_aot

REASON = tpu_aot.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

# an iteration of 40 cycles (1 spill in it), then one of 22 around one of 10 which ends at 0x3c
SCHEDULE = "\n".join(
    [
        "     0   :  { %s0 = inlined_call_operand.hbm }",
        *(f"  {at:#x}   : > {{ %v{at} = vadd.f32 %v1, %v2 }}" for at in range(1, 35)),
        "  0x23 LB: > { %1 = sbr.rel (!%p1_p1) target bundleno = 1 (0x1), region = 3 }",
        "  0x24   :  { %2 = vst [vmem:[#allocation9_spill] sm:$0xff] %v7_v3 }",
        *(f"  {at:#x}   : > {{}}" for at in range(37, 56)),
        "  0x38   : >> { %3 = sbr.rel (!%p2_p2) target bundleno = 52 (0x34), region = 5 }",
        *(f"  {at:#x}   : > {{}}" for at in range(57, 60)),
        "  0x3c   : > { %4 = sbr.rel (!%p3_p3) target bundleno = 44 (0x2c), region = 6 }",
        *(f"  {at:#x}   : > {{}}" for at in range(61, 80)),
    ]
)


def rows(chip: str, **options: str) -> list[dict]:
    arguments = [text for name, value in options.items() for text in (f"--{name}", value)]
    return tpu_aot.run_report("--chip", chip, *arguments, timeout=120)


def check(row: dict) -> None:
    """What holds for every kernel: VMEM is what the block table reckons with, or less."""
    assert row["vmem"] <= row["vmem_estimate"] <= row["vmem_limit"], row


def test_loops_are_read_from_branches_and_spills_from_stores():
    body = tpu_aot.parse_bundles(SCHEDULE)
    assert (body.cycles, body.spills) == (80, 1)
    assert [(loop.cycles, loop.spills) for loop in body.inner] == [(40, 1), (22, 0)]
    assert [loop.cycles for loop in body.inner[1].inner] == [10]
    assert body.inner[1].total([8]) == 22 + 7 * 10
    with pytest.raises(ValueError, match="1 loops in the schedule, 2 in the source"):
        body.inner[1].total([8, 2])


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
def test_decode_keeps_up_with_memory(chip: str):
    found = rows(chip, kernel="decode")
    assert len(found) == 4
    for row in found:
        check(row)
        assert row["kernel"] == "decode"
        assert row["small_spills"] == 0, row
        assert max(row["small"], row["large"]) < row["dma"], row


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
def test_prefill_keeps_the_matrix_units_busy(chip: str):
    [row] = rows(chip, kernel="prefill", layer="Qwen3-30B-A3B")
    check(row)
    assert row["kernel"] == "prefill"
    assert row["mxu"] >= 0.85, row


def test_float32_weights_compile():
    for row in rows("v5e", layer="OLMoE-1B-7B", dtype="float32"):
        check(row)
