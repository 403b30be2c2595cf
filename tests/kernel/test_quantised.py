"""The type of quantised weights: its numbers, shapes and partitions, and rounding to its codes."""

from typing import get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from jmoe_kernels.grouped_mlp import ExpertWeights, grouped_mlp
from jmoe_kernels.matmul import linear
from jmoe_kernels.quantised import LAYOUTS, TABLES, Code, Coding, Quantised, as_float, dequantised

from jmoe.checkpoint.quantised.quantise import quantise
from jmoe.checkpoint.slices import regrouped

CODINGS = (
    Coding("int8", None),
    Coding("int8", 16, "float16", has_lows=True),
    Coding("e4m3", None),
    Coding("e4m3", 128),
    Coding("int4", 32, "float16"),
    Coding("int4", 32, "bfloat16", has_lows=True),
    Coding("e2m1", 32, "uint8"),
    Coding("e2m1", 16),
    Coding("iq4", 32, "float16"),
)
codings = st.sampled_from(CODINGS)


def random_codes(coding: Coding, shape: tuple[int, ...], seed: int = 0) -> Quantised:
    """Returns a weight with random codes and scales, as arrays of numpy."""
    rng, shapes = np.random.default_rng(seed), coding.shapes(shape)
    raw = rng.integers(0, 256, shapes.values.shape, np.uint8)
    raw = np.where(raw & 127 == 127, 0, raw).astype(np.uint8) if coding.code == "e4m3" else raw
    if coding.scales == "uint8":
        scales = rng.integers(110, 130, shapes.scales.shape, np.uint8)
    else:
        scales = rng.uniform(0.01, 1, shapes.scales.shape).astype(coding.scales)
    lows = rng.uniform(-1, 1, shapes.scales.shape).astype(coding.scales) if coding.has_lows else None
    return Quantised(raw.view(shapes.values.dtype), scales, lows, coding, "float32")


def number_by_number(weight: Quantised) -> np.ndarray:
    """Restates the definition: each number from its code, its group's scale and low, in float64."""
    coding, out = weight.coding, np.empty(weight.shape)
    for at in np.ndindex(out.shape):
        *row, i = at
        group = (*row, 0 if coding.group is None else i // coding.group)
        if coding.code in TABLES:
            byte = int(weight.values[(*row, i // 2)])
            code = TABLES[coding.code][byte >> 4 if i % 2 else byte & 15]
        else:
            code = float(weight.values[at])
        scale = weight.scales[group]
        factor = 2.0 ** (int(scale) - 127) if coding.scales == "uint8" else float(scale)
        out[at] = code * factor + (0.0 if weight.lows is None else float(weight.lows[group]))
    return out


@given(codings, st.integers(1, 3), st.integers(1, 5), st.integers(1, 80), st.integers(0, 99))
@settings(max_examples=80)
def test_numbers_are_code_times_scale_plus_low(coding, front, out, half, seed):
    weight = random_codes(coding, (front, out, 2 * half), seed)
    assert weight.shape == (front, out, 2 * half) and weight.ndim == 3
    got = dequantised(weight)
    np.testing.assert_allclose(got, number_by_number(weight), rtol=2e-7, atol=1e-7)
    np.testing.assert_array_equal(dequantised(jax.tree.map(jnp.asarray, weight)), got)
    np.testing.assert_array_equal(dequantised(weight[front - 1]), got[front - 1])
    np.testing.assert_array_equal(dequantised(weight.reshape(front * out)), got.reshape(front * out, -1))


def test_every_exponent_is_a_power_of_two():
    coding = Coding("e2m1", 2, "uint8")
    scales = np.arange(255, dtype=np.uint8)[:, None]
    ones = np.full((255, 1), 0x22, np.uint8)
    for weight in (Quantised(ones, scales, None, coding, "float32"),):
        np.testing.assert_array_equal(
            dequantised(weight)[:, 0], np.ldexp(np.float32(1), np.arange(255) - 127)
        )


def test_every_byte_of_e4m3_may_be_stored_as_a_byte():
    raw = np.array([b for b in range(256) if b & 127 != 127], np.uint8)[None]
    coding = Coding("e4m3", None)
    ones = np.ones((1, 1), np.float32)
    want = raw.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    for values in (raw, raw.view(ml_dtypes.float8_e4m3fn), jnp.asarray(raw)):
        np.testing.assert_array_equal(dequantised(Quantised(values, ones, None, coding, "float32")), want)


@given(
    codings, st.integers(1, 4), st.integers(1, 70), st.integers(0, 99), st.sampled_from([1e-3, 1.0, 300.0])
)
@settings(max_examples=80)
def test_rounding_goes_to_the_nearest_code(coding, out, half, seed, spread):
    if coding.code == "iq4":
        return  # a form that is read and not made
    numbers = np.random.default_rng(seed).normal(0, spread, (out, 2 * half)).astype(np.float32)
    weight = quantise(numbers, coding)
    shapes = coding.shapes(numbers.shape)
    assert weight.values.shape == shapes.values.shape and weight.values.dtype == shapes.values.dtype
    assert weight.scales.shape == shapes.scales.shape and weight.scales.dtype == shapes.scales.dtype
    error = np.abs(dequantised(weight) - numbers)
    group = coding.group or 2 * half
    for start in range(0, 2 * half, group):
        part = slice(start, start + group)
        top = np.abs(numbers[:, part]).max(axis=-1, keepdims=True)
        # half a step of the code, the step itself rounded to the scale's dtype
        step = {"int8": 1 / 127, "int4": 1 / 7, "e4m3": 2 / 16, "e2m1": 2 / 4}[coding.code]
        assert (error[:, part] <= top * step * 0.55 + 1e-6).all()


def test_int4_takes_the_better_of_symmetric_and_min_max():
    symmetric = np.linspace(-7, 7, 32, dtype=np.float32).round()[None]
    shifted = np.linspace(100, 115, 32, dtype=np.float32).round()[None]
    for numbers in (symmetric, shifted):
        weight = quantise(numbers, Coding("int4", 32, "float32", has_lows=True))
        np.testing.assert_array_equal(dequantised(weight), numbers)


@pytest.mark.parametrize("coding", CODINGS, ids=str)
def test_zeros_stay_zeros(coding: Coding):
    if coding.code != "iq4":
        assert not dequantised(quantise(np.zeros((2, 64), np.float32), coding)).any()


def test_numbers_that_no_scale_holds_are_refused():
    numbers = np.full((1, 32), 1e6, np.float32)
    numbers[0, 0] = -1e6
    with pytest.raises(ValueError, match=r"too large for float16 scales \(int4, groups of 32 with lows\)"):
        quantise(numbers, Coding("int4", 32, "float16", has_lows=True))
    assert np.isfinite(dequantised(quantise(numbers, Coding("int8", None)))).all()


def test_what_cannot_be_packed_or_split_is_refused():
    with pytest.raises(ValueError, match="rows of 33 numbers do not pack into whole bytes of int4"):
        Coding("int4", 32).shapes((2, 33))
    with pytest.raises(ValueError, match="8 parts of rows of 8 numbers cut a byte of int4"):
        Coding("int4", 4).split(8, 8)
    with pytest.raises(ValueError, match="lows need floating-point scales"):
        Coding("int4", 32, "uint8", has_lows=True)


@given(codings, st.sampled_from([2, 4, 8]), st.integers(1, 6))
@settings(max_examples=40)
def test_groups_that_ranks_cut_become_smaller(coding: Coding, parts: int, times: int):
    inner = parts * 8 * times
    split = coding.split(inner, parts)
    weight = random_codes(coding, (3, inner))
    finer = regrouped(weight, split)
    np.testing.assert_array_equal(dequantised(finer), dequantised(weight))
    local = inner // parts
    if split.group is not None:
        assert local % split.group == 0
    packed = finer.values.shape[-1] // parts
    groups = 1 if split.group is None else finer.scales.shape[-1] // parts
    for rank in range(parts):
        mine = slice(None) if split.group is None else slice(rank * groups, (rank + 1) * groups)
        lows = None if finer.lows is None else finer.lows[:, mine]
        codes = finer.values[:, rank * packed : (rank + 1) * packed]
        own = Quantised(codes, finer.scales[:, mine], lows, split, "float32")
        np.testing.assert_array_equal(
            dequantised(own), dequantised(weight)[:, rank * local : (rank + 1) * local]
        )


def test_a_scale_of_a_whole_row_is_on_every_rank_that_has_a_part_of_it():
    axes = P("expert", None, "tensor")
    by_row = Coding("int8", None).shapes((4, 8, 64)).split(axes)
    assert (by_row.values, by_row.scales, by_row.lows) == (axes, P("expert", None, None), None)
    by_group = Coding("int4", 32, "float16", True).shapes((4, 8, 64)).split(axes)
    assert (by_group.values, by_group.scales, by_group.lows) == (axes, axes, axes)


@pytest.mark.parametrize("coding", CODINGS, ids=str)
def test_products_are_those_of_the_dequantised_weight(coding: Coding):
    weight = jax.tree.map(jnp.asarray, random_codes(coding, (24, 64)))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 64)), jnp.float32)
    np.testing.assert_allclose(linear(x, weight), linear(x, as_float(weight)), rtol=1e-6)
    gate_up, down = (
        jax.tree.map(jnp.asarray, random_codes(coding, s)) for s in ((4, 2, 16, 64), (4, 64, 16))
    )
    rows, sizes = (
        jnp.asarray(np.random.default_rng(2).normal(size=(9, 64)), jnp.float32),
        jnp.array([3, 0, 5, 1]),
    )
    plain = ExpertWeights(as_float(gate_up), as_float(down))
    want = grouped_mlp(rows, plain, sizes, implementation="reference")
    for name in ("xla", "reference"):
        got = grouped_mlp(rows, ExpertWeights(gate_up, down), sizes, implementation=name)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("code", get_args(Code))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_keeps_numbers_shape_and_bytes(layout, code):
    for scales, group in (("float32", None), ("uint8", 32), ("float16", 16)):
        coding = Coding(code, group, scales, has_lows=scales == "float16")
        weight = random_codes(coding, (3, 2, 64, 96))
        packed, shapes = weight.in_layout(layout), coding.shapes(weight.shape, layout=layout)
        assert packed.shape == shapes.shape == weight.shape
        np.testing.assert_array_equal(dequantised(packed), dequantised(weight))
        on_device = jax.tree.map(jnp.asarray, packed)
        np.testing.assert_array_equal(jax.jit(dequantised)(on_device[1]), dequantised(weight)[1])
        assert [(a.shape, a.dtype) for a in jax.tree.leaves(on_device)] == [
            (a.shape, a.dtype) for a in jax.tree.leaves(shapes)
        ]
        nbytes = sum(a.nbytes for a in jax.tree.leaves(packed))
        halves = packed.values.nbytes // 2 if packed.values.dtype == jnp.int4 else 0
        assert coding.nbytes(weight.shape, layout) == nbytes - halves


def test_columns_are_split_by_the_axes_of_their_rows():
    coding = Coding("int4", 32, "float16", has_lows=True)
    packed = coding.shapes((4, 2, 64, 96), layout="columns")
    split = packed.split(P("expert", None, "tensor"))
    assert split.values == P("expert", None, None, "tensor")
    assert split.scales == split.lows == P("expert", None, None, None, "tensor")
    of_down = coding.shapes((4, 64, 96), layout="columns").split(P("expert", None, "tensor"))
    assert of_down.values == P("expert", "tensor", None)
    assert of_down.scales == P("expert", "tensor", None, None)
    whole_rows = Coding("int8", None).shapes((4, 64, 96), layout="columns")
    assert whole_rows.split(P("expert", None, "tensor")).scales == P("expert", None, None, None)
