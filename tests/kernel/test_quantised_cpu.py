"""Tests the C++ kernels with quantised weights, their layout, and their agreement with the portable form."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jmoe_kernels import cpu
from jmoe_kernels.choice import choose_kernels
from jmoe_kernels.grouped_mlp import ExpertWeights, grouped_mlp
from jmoe_kernels.matmul import linear
from jmoe_kernels.quantised import Coding, dequantised
from jmoe_kernels.quantised.interleave import interleave, interleaved, part_of, rows_of
from support import quantised_kernels
from support.quantised_kernels import CODES, in_blocks, on_device, random_weight

LIBRARY = cpu.get_library()
needs_library = pytest.mark.skipif(isinstance(LIBRARY, str), reason=f"no C++ kernels here: {LIBRARY}")


@pytest.mark.parametrize("check", quantised_kernels.CHECKS, ids=lambda c: c.__name__)
def test_every_instruction_set_equals_float64(check, isa: str):
    check()


@given(
    code=st.sampled_from(CODES),
    group=st.sampled_from((None, 16, 32, 100)),
    blocks=st.integers(1, 3),
    steps=st.integers(1, 9),
    front=st.lists(st.integers(1, 3), max_size=2),
)
def test_interleaved_weights_come_back(code, group, blocks: int, steps: int, front: list[int]):
    coding = Coding(code, group, "float16", has_lows=True)
    weight = random_weight(coding, (*front, 16 * blocks, steps * 4 * coding.num_packed))
    packed = in_blocks(weight)
    assert packed.layout == "n16" and packed.shape == weight.shape
    np.testing.assert_array_equal(dequantised(packed), dequantised(weight))
    for role, array, own in zip(*map(jax.tree.leaves, (weight.roles, packed, weight)), strict=True):
        np.testing.assert_array_equal(rows_of(array, part_of(role, code)), own)


def test_interleaving_in_place_equals_a_copy_in_chunks_of_any_size(monkeypatch):
    rows = np.random.default_rng(0).integers(0, 256, (3, 48, 40)).astype(np.uint8)
    copies = {part: interleaved(rows, part) for part in ("bytes", "nibbles", "scales")}
    monkeypatch.setattr("jmoe_kernels.quantised.interleave.CHUNK", 1500)
    for part, copy in copies.items():
        mine = rows.copy()
        interleave(mine, part)
        np.testing.assert_array_equal(mine, copy)
        assert copy.ctypes.data % 64 == 0


def test_rows_of_an_interleaved_embedding_are_those_of_the_table():
    weight = random_weight(Coding("int4", 32), (64, 96))
    ids = np.array([0, 63, 17, 17, 31])
    want = dequantised(weight)[ids]
    for kept in (weight, in_blocks(weight)):
        np.testing.assert_array_equal(on_device(kept).take_rows(jax.numpy.asarray(ids)), want)


@needs_library
@pytest.mark.parametrize("code", CODES)
def test_the_kernels_agree_with_the_portable_form(code):
    rng = np.random.default_rng(1)
    coding = Coding(code, 32, "float16")
    x = rng.standard_normal((11, 64), np.float32)
    dense = on_device(in_blocks(random_weight(coding, (48, 64))))
    close = {"rtol": 1e-3, "atol": 1e-3}
    np.testing.assert_allclose(linear(x, dense, "cpu"), linear(x, dense, "xla"), **close)
    pair = random_weight(coding, (3, 2, 32, 64)), random_weight(coding, (3, 64, 32), 1)
    weights = ExpertWeights(*(on_device(in_blocks(w)) for w in pair))
    sizes = jax.numpy.asarray([4, 0, 6], jax.numpy.int32)
    own, portable = (grouped_mlp(x, weights, sizes, implementation=name) for name in ("cpu", "xla"))
    scale = float(np.abs(portable).max())
    np.testing.assert_allclose(own / scale, portable / scale, atol=1e-4)
    rounded = grouped_mlp(x, weights, sizes, implementation="cpu", activations="int8")
    error = np.abs(rounded - own).max() / scale
    assert 1e-5 < error < 3e-2


def test_eight_bit_floats_of_a_bfloat16_model_take_activations_in_bfloat16(isa: str):
    """Instruction sets without products in bfloat16 keep the activations as they are."""
    x = np.random.default_rng(2).standard_normal((11, 96), np.float32)
    weight = random_weight(Coding("e4m3", 32), (48, 96))
    rounded = x.astype(jax.numpy.bfloat16).astype(np.float64)
    exact, rough = (rows @ dequantised(weight).astype(np.float64).T for rows in (x, rounded))
    found = np.asarray(linear(x, on_device(in_blocks(replace(weight, dtype="bfloat16"))), "cpu"))
    scale = np.abs(exact).max()
    errors = [np.abs(found - want).max() / scale for want in (exact, rough)]
    assert min(errors) < 1e-6 and max(errors) > 1e-4


@needs_library
def test_groups_that_the_kernels_cannot_take_run_in_portable_form():
    odd, even = Coding("int8", 24), Coding("int8", 32)
    dims, pick = (4, 32, 96), lambda c: choose_kernels("cpu", "float32", dims=dims, codings=((c, c),))
    assert pick(even).experts == "cpu"
    kernels = pick(odd)
    assert kernels.experts == "xla" and "groups of 24); the kernel takes groups of 16" in kernels.why_experts
    x, weight = np.ones((3, 96), np.float32), on_device(random_weight(odd, (32, 96)))
    np.testing.assert_allclose(linear(x, weight, "cpu"), x @ dequantised(weight).T, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"moe.kernel: implementation 'cpu': weights are quantised"):
        choose_kernels("cpu", "float32", "cpu", dims, codings=((odd, odd),))
