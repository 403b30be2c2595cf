"""FP8, NVFP4, MXFP4 and MXFP8 of compressed-tensors have the numbers that their definitions give them."""

import os

import numpy as np
import pytest
from support.models import compressed as ct

from jmoe.checkpoint.slices import read_slice

CASES = ct.FP8 | ct.SMALL_FLOATS


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(48, 160), (50, 96), (1, 32)])
def test_numbers_are_exact(case, shape, tmp_path):
    form = CASES[case]
    tensors, numbers = form.write(np.random.default_rng(0), shape)
    coding, got = ct.read_weight(tmp_path, tensors, form.config(), shape)
    np.testing.assert_array_equal(got, numbers)
    assert coding.code == ("e2m1" if case.endswith("FP4") else "e4m3")
    assert coding.scales == ("uint8" if case.startswith("MX") else "float32")


NAN = np.full((48, 160), np.nan, ct.E4M3)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("FP8 a row", {"": NAN}, r"q_proj.weight' has NaN"),
        (
            "FP8 a row",
            {"_scale": np.full((48, 1), np.nan, ct.BFLOAT16)},
            r"weight_scale' has a scale that is NaN",
        ),
        (
            "FP8 a row",
            {"_scale": np.ones(1, np.float32)},
            r"weight_scale' must be \[48, 1\] by .*, it is \[1\]",
        ),
        ("FP8 a row", {"": np.zeros((48, 160), np.int8)}, r"q_proj.weight' has dtype I8; supported: F8_E4M3"),
        ("FP8 in blocks", {"_scale": np.ones((2, 3), np.float32)}, r"must be \[2, 4\] by .*, it is \[2, 3\]"),
        ("NVFP4", {"_scale": NAN[:, :10]}, r"weight_scale' has a scale that is NaN or Inf"),
        (
            "NVFP4",
            {"_global_scale": np.zeros(1, np.float32)},
            r"weight_global_scale' has the scale 0.0, with which",
        ),
        (
            "NVFP4",
            {"_global_scale": np.full(1, np.nan, np.float32)},
            r"weight_global_scale' has a scale that is NaN",
        ),
        ("NVFP4", {"_scale": np.ones((48, 5), ct.E4M3)}, r"must be \[48, 10\] by .*, it is \[48, 5\]"),
        (
            "MXFP4",
            {"_scale": np.full((48, 5), 255, np.uint8)},
            r"weight_scale' has the scale 255, which is NaN",
        ),
        ("MXFP4", {"_packed": np.zeros((48, 160), np.uint8)}, r"must be \[48, 80\] by .*, it is \[48, 160\]"),
        (
            "MXFP8",
            {"_scale": np.full((48, 5), 255, np.uint8)},
            r"weight_scale' has the scale 255, which is NaN",
        ),
        (
            "MXFP8",
            {"_scale": np.ones((48, 5), np.float32)},
            r"weight_scale' has dtype F32; supported: F8_E8M0, U8",
        ),
    ],
)
def test_tensors_that_contradict_the_configuration(case, change, message, tmp_path):
    form = CASES[case]
    tensors = form.write(np.random.default_rng(0), (48, 160))[0]
    with pytest.raises(ValueError, match=message) as error:
        ct.read_weight(tmp_path, tensors | change, form.config())
    assert "\n" not in str(error.value) and str(tmp_path / "model.safetensors") in str(error.value)


@pytest.mark.parametrize(("case", "size"), [("NVFP4", 16), ("MXFP4", 32), ("MXFP8", 32)])
def test_sizes_that_blocks_do_not_divide(case, size, tmp_path):
    form = CASES[case]
    tensors = form.write(np.random.default_rng(0), (48, 160))[0]
    with pytest.raises(ValueError, match=rf"rows of 152 do not split into (blocks|groups) of {size}"):
        ct.read_weight(tmp_path, tensors, form.config(), (48, 152))


@pytest.mark.parametrize("case", ct.CASES)
def test_a_file_that_is_cut_off_after_it_was_opened(case, tmp_path):
    form = ct.CASES[case]
    tensors = form.write(np.random.default_rng(0), (48, 160))[0]
    with ct.stored_weight(tmp_path, tensors, form.config()) as (checkpoint, param, _):
        last = max((checkpoint.tensors[name] for name in param.names), key=lambda info: info.offset)
        os.truncate(last.file, last.offset + 1)
        with pytest.raises(
            ValueError, match=r"model\.safetensors: truncated: \d+ bytes are needed, \d+ are there"
        ):
            read_slice(checkpoint, param, np.empty((48, 160), np.float32))
