"""Integers of eight bits have the numbers that their definition gives them, however their scales lie."""

import numpy as np
import pytest
from support.models import compressed as ct


@pytest.mark.parametrize("case", ct.BYTES)
@pytest.mark.parametrize("shape", [(48, 160), (50, 96), (1, 32)])
def test_numbers_are_exact(case, shape, tmp_path):
    form = ct.BYTES[case]
    tensors, numbers = form.write(np.random.default_rng(0), shape)
    coding, got = ct.read_weight(tmp_path, tensors, form.config(), shape)
    np.testing.assert_array_equal(got, numbers)
    assert coding.code == "int8" and coding.has_lows == ("zeros" in case)


def test_a_scale_of_the_whole_tensor_may_have_no_axis(tmp_path):
    form = ct.BYTES["W8A8 in all"]
    tensors, numbers = form.write(np.random.default_rng(0), (48, 160))
    tensors["_scale"] = tensors["_scale"].reshape(())
    np.testing.assert_array_equal(ct.read_weight(tmp_path, tensors, form.config())[1], numbers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_scale": np.full((48, 1), np.inf, np.float32)}, r"weight_scale' has a scale that is NaN or Inf"),
        (
            {"_scale": np.ones(48, np.float32)},
            r"weight_scale' must be \[48, 1\] by config.json, it is \[48\]",
        ),
        ({"": np.zeros((48, 160), np.uint8)}, r"q_proj.weight' has dtype U8; supported: I8"),
        ({"_zero_point": None}, None),
    ],
)
def test_tensors_that_contradict_the_configuration(change, message, tmp_path):
    form = ct.BYTES["W8A8"]
    tensors = form.write(np.random.default_rng(0), (48, 160))[0]
    config = form.config()
    if message is None:  # zero points are promised, and there are none
        form = ct.BYTES["W8 a row with zeros"]
        config, change = form.config(), {}
        message = r"'model.layers.0.self_attn.q_proj.weight_zero_point' is missing: by config.json's .* needs"
    with pytest.raises(ValueError, match=message) as error:
        ct.read_weight(tmp_path, tensors | change, config)
    assert "\n" not in str(error.value) and str(tmp_path / "model.safetensors") in str(error.value)
