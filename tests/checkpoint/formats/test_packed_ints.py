"""Integers packed into words of 32 bits have the numbers that their definition gives them."""

import numpy as np
import pytest
from support.models import compressed as ct

CODINGS = {
    "int4 g32": "int4, groups of 32 in bfloat16",
    "int4 g32, weights ordered": "int4, groups of 32 in bfloat16",
    "int4 g16, float32": "int4, groups of 16 in float32",
    "int4 g16, float16": "int4, groups of 16 in float16",
    "int4 a row": "int4, one scale a row in bfloat16",
    "int4 in all": "int4, one scale a row in bfloat16",
    "int4 g32 with zeros": "int4, groups of 32 with lows in float32",
    "int4 a row with zeros": "int4, one scale a row with lows in float32",
    "int8 g32": "int8, groups of 32 in bfloat16",
    "int8 g32 with zeros": "int8, groups of 32 with lows in float32",
    "int8 packed a row": "int8, one scale a row in bfloat16",
}


@pytest.mark.parametrize("case", ct.PACKED)
@pytest.mark.parametrize("shape", [(48, 160), (5, 32), (1, 96)])
def test_numbers_are_exact(case, shape, tmp_path):
    form = ct.PACKED[case]
    tensors, numbers = form.write(np.random.default_rng(0), shape)
    coding, got = ct.read_weight(tmp_path, tensors, form.config(), shape)
    np.testing.assert_array_equal(got, numbers)
    assert f"{coding} in {coding.scales}" == CODINGS[case]


def test_a_row_that_ends_within_a_word(tmp_path):
    form = ct.PACKED["int4 a row with zeros"]
    tensors, numbers = form.write(np.random.default_rng(0), (11, 30))
    assert tensors["_packed"].shape == (11, 4) and tensors["_zero_point"].shape == (2, 1)
    np.testing.assert_array_equal(ct.read_weight(tmp_path, tensors, form.config(), (11, 30))[1], numbers)


def changed(case: str, shape=(48, 160), **tensors) -> dict[str, np.ndarray]:
    return ct.PACKED[case].write(np.random.default_rng(0), shape)[0] | tensors


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            changed("int4 g32", _shape=np.array([48, 128])),
            r"q_proj.weight_shape' says \[48, 128\], config.json says \[48, 160\]",
        ),
        (
            changed("int4 g32", _scale=np.full((48, 5), np.nan, np.float32)),
            r"q_proj.weight_scale' has a scale that is NaN or Inf",
        ),
        (
            changed("int4 g32", _scale=np.ones((48, 10), np.float32)),
            r"weight_scale' must be \[48, 5\] by config.json, it is \[48, 10\]",
        ),
        (changed("int8 g32"), r"weight_packed' must be \[48, 20\] by config.json, it is \[48, 40\]"),
        (
            changed("int4 g32", _packed=np.zeros((48, 20), np.int64)),
            r"weight_packed' has dtype I64; supported: I32",
        ),
        (
            changed("int4 g32", _scale=np.ones((48, 5), np.int8)),
            r"weight_scale' has dtype I8; supported: F32, BF16, F16",
        ),
    ],
)
def test_tensors_that_contradict_the_configuration(tensors, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        ct.read_weight(tmp_path, tensors, ct.PACKED["int4 g32"].config())
    assert "\n" not in str(error.value) and str(tmp_path / "model.safetensors") in str(error.value)


def test_sizes_that_groups_do_not_divide(tmp_path):
    form = ct.PACKED["int4 g32"]
    with pytest.raises(ValueError, match=r"q_proj.weight': rows of 144 do not split into groups of 32"):
        ct.read_weight(tmp_path, changed("int4 g32", (48, 160)), form.config(), (48, 144))
    row = ct.PACKED["int4 a row"]
    with pytest.raises(ValueError, match=r"q_proj.weight': rows of 31 numbers do not pack into whole bytes"):
        ct.read_weight(tmp_path, changed("int4 a row", (4, 31)), row.config(), (4, 31))
