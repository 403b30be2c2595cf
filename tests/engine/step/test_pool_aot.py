"""No step on TPUs and GPUs reads or writes the whole page pool, by their compilers alone."""

import pytest
from shared import tpu_compiler as tpu_aot
from support.aot import gpu as gpu_aot
from support.aot import pool as pool_aot
from support.aot.pool_cases import DECODE, Found, Pool, check

pytestmark = [pytest.mark.aot, pytest.mark.matrix]
needs_gpu_compiler = pytest.mark.skipif(gpu_aot.missing() is not None, reason=str(gpu_aot.missing()))
needs_tpu_compiler = pytest.mark.skipif(tpu_aot.why_not() is not None, reason=str(tpu_aot.why_not()))
PAGES, ONE = 1 << 16, (1, 1, 1)
CASES: dict[str, pool_aot.Case] = {
    "sinks and windows": (Pool("sinks and windows", wide=True, pages=PAGES), ONE),
    "latent, decode": (Pool("latent", DECODE, wide=True, pages=PAGES), ONE),
    "a page's copy": (Pool(wide=True, pages=PAGES, copies=True), ONE),
    "mixed, on a mesh": (Pool(wide=True, pages=PAGES), (1, 4, 2)),
    "fp8, decode": (Pool("fp8", DECODE, wide=True, pages=PAGES), ONE),
}


@pytest.fixture(scope="module")
def on_tpu() -> dict[str, Found]:
    return dict(zip(CASES, pool_aot.found_on("tpu", list(CASES.values())), strict=True))


@pytest.fixture(scope="module")
def on_gpu() -> dict[str, Found]:
    return dict(zip(CASES, pool_aot.found_on("gpu", list(CASES.values())), strict=True))


@needs_tpu_compiler
@pytest.mark.parametrize("case", CASES)
def test_a_tpu_walks_over_no_pool(case: str, on_tpu: dict[str, Found]):
    check(on_tpu[case])


@needs_gpu_compiler
@pytest.mark.parametrize("case", CASES)
def test_a_gpu_walks_over_no_pool(case: str, on_gpu: dict[str, Found]):
    check(on_gpu[case], counts=False)
