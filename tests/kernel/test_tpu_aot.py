"""The TPU kernels compile at real layer sizes, fit the memory, and are not slower than HBM."""

import pytest
from shared import tpu_compiler as tpu_aot
from support.aot.kernel_report import run_report

REASON = tpu_aot.why_not()
pytestmark = [pytest.mark.aot, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

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


PATTERNS = (
    *("*/[MQO]*/decode/bfloat16", "*/DeepSeek-V2*/decode/bfloat16", "*/Qwen3*/prefill/bfloat16"),
    "v5e/OLMoE*/float32",
)
# forms whose decode must keep up with memory: int8 and e4m3 on a chip each, int4 on the slowest and fastest
CODED = ("v6e/Qwen3*/decode/int8", "v5e/Qwen3*/decode/int4-g128", "v5p/Qwen3*/decode/e4m3-g128")


@pytest.fixture(scope="module")
def report() -> list[dict]:
    return run_report("--only", *PATTERNS, timeout=300)


@pytest.fixture(scope="module")
def coded_report() -> list[dict]:
    return run_report("--only", *CODED, timeout=300)


def test_decode_of_quantised_weights_keeps_up_with_memory(coded_report: list[dict]):
    assert len(coded_report) == len(CODED)
    for row in coded_report:
        assert row["small"] < row["dma"], row
        assert row["vmem"] <= row["vmem_estimate"] <= row["vmem_limit"], row


def test_loops_are_read_from_branches_and_spills_from_stores():
    body = tpu_aot.parse_bundles(SCHEDULE)
    assert (body.cycles, body.spills) == (80, 1)
    assert [(loop.cycles, loop.spills) for loop in body.inner] == [(40, 1), (22, 0)]
    assert [loop.cycles for loop in body.inner[1].inner] == [10]
    assert body.inner[1].total([8]) == 22 + 7 * 10
    with pytest.raises(ValueError, match="1 loops in the schedule, 2 in the source"):
        body.inner[1].total([8, 2])


def test_vmem_is_what_the_block_table_reckons_with_or_less(report: list[dict]):
    assert len(report) == 3 * 4 + 3 + 2
    for row in report:
        assert row["vmem"] <= row["vmem_estimate"] <= row["vmem_limit"], row


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
def test_decode_keeps_up_with_memory(chip: str, report: list[dict]):
    found = [r for r in report if (r["chip"], r["kernel"], r["dtype"]) == (chip, "decode", "bfloat16")]
    assert len(found) == 4
    for row in found:
        assert row["small_spills"] == 0, row
        assert max(row["small"], row["large"]) < row["dma"], row


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
def test_prefill_keeps_the_matrix_units_busy(chip: str, report: list[dict]):
    [row] = [r for r in report if (r["chip"], r["kernel"], r["dtype"]) == (chip, "prefill", "bfloat16")]
    assert row["mxu"] >= 0.9, row
