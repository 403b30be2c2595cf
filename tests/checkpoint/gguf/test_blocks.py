"""Every type of ggml has the numbers that the ``gguf`` package reads from the same blocks."""

import numpy as np
import pytest
from jmoe_kernels.quantised import Quantised, dequantised
from support.models.gguf_models import HALVES, gguf, random_blocks

from jmoe.checkpoint.gguf.blocks import BLOCKS, FORMATS
from jmoe.checkpoint.gguf.file import TYPES


def own_numbers(kind: str, raw: np.ndarray) -> np.ndarray:
    values, scales, lows = FORMATS[kind].unpack(raw)
    return dequantised(Quantised(values, scales, lows, FORMATS[kind].coding, "float32"))


def test_the_table_of_types_is_the_package_s():
    sizes = {each.value: (each.name, *sizes) for each, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert {number: sizes.get(number) for number in TYPES} == TYPES
    assert HALVES.keys() == FORMATS.keys()


@pytest.mark.parametrize("kind", FORMATS)
def test_random_blocks_have_the_package_s_numbers(kind: str):
    raw = random_blocks(kind, 256 * 300, np.random.default_rng(0))
    want = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(own_numbers(kind, raw).reshape(want.shape), want)


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if HALVES[kind]])
def test_blocks_with_any_scale_have_the_package_s_numbers(kind: str):
    """The low of int4 codes is a sum of two numbers, so its last bit may be rounded."""
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 256, (400, BLOCKS[kind][1]), dtype=np.uint8)
    for at in HALVES[kind]:
        halves = raw[:, at : at + 2].copy().view(np.float16)
        raw[:, at : at + 2] = np.where(np.isfinite(halves), halves, np.float16(0.5)).view(np.uint8)
    want = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])
    got = own_numbers(kind, raw).reshape(want.shape)
    if kind in ("Q4_K", "Q4_1"):
        largest = np.abs(want).max(axis=-1, keepdims=True)
        assert (np.abs(got - want) <= 2**-20 * largest).all()
    else:
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("exponent", [0, 1, 2, 127, 250])
def test_mxfp4_reads_every_exponent(exponent: int):
    raw = np.full((2, 17), exponent, np.uint8)
    raw[:, 1:] = np.arange(32, dtype=np.uint8).reshape(2, 16) * 8
    want = gguf.dequantize(raw, gguf.GGMLQuantizationType.MXFP4)
    np.testing.assert_array_equal(own_numbers("MXFP4", raw).reshape(want.shape), want)
