"""Each form in which checkpoints keep a slice of a parameter is read exactly, without any other byte."""

import os
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import SingleDeviceSharding
from jmoe_kernels.quantised import Quantised, dequantised
from safetensors.numpy import save_file
from support.models import stored_forms as forms

from jmoe.checkpoint import slices
from jmoe.checkpoint.hf.reader import HFCheckpoint
from jmoe.checkpoint.layouts import entries
from jmoe.checkpoint.params import ParamSpec
from jmoe.checkpoint.quantised.formats import StoredParam
from jmoe.checkpoint.quantised.formats.mxfp4 import IN_BLOCKS
from jmoe.checkpoint.slices import check_shapes, read_slice
from jmoe.models.weights import PLAIN, Form

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = (np.dtype(np.float32), BFLOAT16)
MXFP4 = IN_BLOCKS


@contextmanager
def checkpoint_of(directory: Path, tensors: dict[str, np.ndarray]):
    save_file(tensors, directory / "model.safetensors")
    with HFCheckpoint(directory) as checkpoint:
        yield checkpoint


def read(
    checkpoint: HFCheckpoint, stored: StoredParam, shape: tuple[int, ...], dtype=np.float32
) -> np.ndarray:
    out = np.full(shape, 77, dtype)
    read_slice(checkpoint, stored, out)
    return out


def numbers(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Returns different whole numbers, 256 at most, so that bfloat16 has them too."""
    return rng.permutation(int(np.prod(shape))).reshape(shape).astype(np.float32)


UNQUANTISED = (
    PLAIN, forms.HALVES, forms.TURNS, forms.TURNED, forms.TURNED_HALVES, forms.TURNED_TURNS
)  # fmt: skip


@given(
    form=st.sampled_from(UNQUANTISED),
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 6)),
    bias=st.booleans(),
    count=st.integers(0, 3),
    dtypes=st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)),
    chunk=st.sampled_from([1, 8, 40, 1 << 20]),
    seed=st.integers(0, 9),
)
@settings(max_examples=150, deadline=None)
def test_every_entry_in_every_form(tmp_path_factory, form, sizes, bias, count, dtypes, chunk, seed):
    bias = bias and not form.is_transposed
    shape = sizes[:1] if bias else sizes
    shape = shape if form.row_layout == "plain" else (2, *shape)
    values = [numbers(np.random.default_rng(seed + e), shape) for e in range(max(1, count))]
    stored = [forms.as_stored(v, form).astype(dtypes[0]) for v in values]
    tensor = np.stack(stored) if count else stored[0]
    directory = tmp_path_factory.mktemp("forms")
    [entry] = entries(StoredParam("t", "p", form=form), shape)
    assert entry.shape == stored[0].shape
    whole, slices.CHUNK = slices.CHUNK, chunk
    try:
        with checkpoint_of(directory, {"t": tensor, "after": np.full(99, 88, np.float32)}) as checkpoint:
            for e, want in enumerate(values):
                got = read(
                    checkpoint, StoredParam("t", "p", (), e if count else None, form), shape, dtypes[1]
                )
                np.testing.assert_array_equal(got.astype(np.float32), want)
    finally:
        slices.CHUNK = whole


@given(
    gate_up=st.booleans(),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 2)),
    dtype=st.sampled_from(FLOATS),
    chunk=st.sampled_from([1, 300, 1 << 20]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_four_bits_are_what_their_format_says(tmp_path_factory, gate_up, sizes, dtype, chunk, seed):
    rng, (rows, blocks_a_row) = np.random.default_rng(seed), sizes
    lies = (3, 2 * rows if gate_up else rows, blocks_a_row)
    blocks = rng.integers(0, 256, (*lies, 16), np.uint8)
    scales = rng.integers(0, 253, lies, np.uint8)  # 6 * 2^126 is no longer finite
    want = forms.decoded(blocks, scales)[1].astype(dtype)
    if gate_up:
        want = np.stack([want[0::2], want[1::2]])
    stored = StoredParam("w", "p", (), 1, forms.TURNS if gate_up else PLAIN, format=MXFP4)
    assert [e.shape for e in entries(stored, want.shape)] == [blocks.shape[1:], scales.shape[1:]]
    whole, slices.CHUNK = slices.CHUNK, chunk
    try:
        directory = tmp_path_factory.mktemp("mxfp4")
        with checkpoint_of(directory, {"w_blocks": blocks, "w_scales": scales}) as checkpoint:
            np.testing.assert_array_equal(read(checkpoint, stored, want.shape, dtype), want)
    finally:
        slices.CHUNK = whole


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_four_bits_are_what_transformers_makes_of_them(dtype):
    """Every byte with every finite scale, from the smallest to the largest, has transformers' value."""
    torch = pytest.importorskip("torch")
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    blocks = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(255, axis=1)
    scales = np.arange(255, dtype=np.uint8).reshape(1, 255, 1).repeat(16, axis=2)
    theirs = mxfp4.convert_moe_packed_tensors(
        torch.from_numpy(blocks), torch.from_numpy(scales), dtype=getattr(torch, dtype)
    )
    want = theirs.transpose(1, 2).to(torch.float64).numpy()[0]  # those of transformers are [in, out]
    codes = Quantised(blocks.reshape(255, -1), scales.reshape(255, -1), None, MXFP4.coding, "float32")
    with np.errstate(over="ignore"):
        got = dequantised(codes).astype(dtype if dtype == "float32" else BFLOAT16)
    np.testing.assert_array_equal(got.astype(np.float64), want)
    assert np.isinf(want[254]).any() and np.isfinite(want[252]).all()
    assert np.abs(want[0][want[0] != 0]).min() == 2.0**-128


def test_bytes_next_to_the_entry_are_not_read(tmp_path):
    values = np.ones((3, 4, 2), np.float32)
    values[2, 3, 1] = np.nan
    path = tmp_path / "model.safetensors"
    for form in (PLAIN, forms.TURNED, forms.TURNED_TURNS, forms.HALVES):
        shape = {"plain": (4, 2)}.get(form.row_layout, (2, 1, 4) if form.is_transposed else (2, 2, 2))
        shape = (2, 4) if form == forms.TURNED else shape
        with checkpoint_of(tmp_path, {"t": values}) as checkpoint:
            assert (read(checkpoint, StoredParam("t", "p", (), 1, form), shape) == 1).all()
            with pytest.raises(ValueError, match=r"'t' has NaN or Inf \(as float32\)"):
                read(checkpoint, StoredParam("t", "p", (), 2, form), shape)
            os.truncate(path, path.stat().st_size - 9 * 4)  # without the last entry and one number before it
            assert (read(checkpoint, StoredParam("t", "p", (), 0, form), shape) == 1).all()
            with pytest.raises(ValueError, match="truncated"):
                read(checkpoint, StoredParam("t", "p", (), 1, form), shape)
            with pytest.raises(ValueError, match="'t' has 24 values, asked for those to 32"):
                read(checkpoint, StoredParam("t", "p", (), 3, form), shape)


@pytest.mark.parametrize(
    ("form", "number_format"), [(forms.TURNED_TURNS, None), (forms.TURNS, None), (forms.TURNS, MXFP4)]
)
def test_an_entry_takes_the_memory_of_a_chunk_and_of_its_codes(tmp_path, form, number_format):
    shape = (2, 2048, 1024)  # 16 MiB
    stored = StoredParam("t", "p", (), 1, form, format=number_format)
    dtype = np.uint8 if number_format else np.float32
    tensors = {e.name: np.zeros((2, *e.shape), dtype) for e in entries(stored, shape)}
    with checkpoint_of(tmp_path, tensors) as checkpoint:
        out = np.ones(shape, np.float32)
        tracemalloc.start()
        read_slice(checkpoint, stored, out)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert not out.any() and peak < (14 << 20 if number_format else 6 << 20)


def test_a_scale_that_is_no_number_and_numbers_beyond_the_dtype(tmp_path):
    blocks, scales = np.full((2, 4, 1, 16), 0x22, np.uint8), np.full((2, 4, 1), 127, np.uint8)
    scales[1, 2] = 255
    with checkpoint_of(tmp_path, {"w_blocks": blocks, "w_scales": scales}) as checkpoint:
        assert (read(checkpoint, StoredParam("w", "p", (), 0, PLAIN, format=MXFP4), (4, 32)) == 1).all()
        with pytest.raises(
            ValueError, match=r"model\.safetensors: tensor 'w_scales' has the scale 255, .*NaN"
        ):
            read(checkpoint, StoredParam("w", "p", (), 1, PLAIN, format=MXFP4), (4, 32))
    scales[1, 2], blocks[1, 2, 0, 3] = 254, 0x42  # 1 and 2 times 2^127
    for dtype in FLOATS:
        with (
            checkpoint_of(tmp_path, {"w_blocks": blocks, "w_scales": scales}) as checkpoint,
            pytest.raises(ValueError, match=rf"'w_blocks' has NaN or Inf \(as {dtype}\)"),
        ):
            read(checkpoint, StoredParam("w", "p", (), 1, PLAIN, format=MXFP4), (4, 32), dtype)


def test_scales_that_are_cut_off_while_they_are_read(tmp_path):
    tensors = {"w_blocks": np.zeros((2, 4, 1, 16), np.uint8), "w_scales": np.zeros((2, 4, 1), np.uint8)}
    with checkpoint_of(tmp_path, tensors) as checkpoint:
        last = max(checkpoint.tensors.values(), key=lambda info: info.offset)
        assert last == checkpoint.tensors["w_scales"]
        os.truncate(last.file, last.offset + 6)
        read(checkpoint, StoredParam("w", "p", (), 0, PLAIN, format=MXFP4), (4, 32))
        with pytest.raises(ValueError, match="truncated"):
            read(checkpoint, StoredParam("w", "p", (), 1, PLAIN, format=MXFP4), (4, 32))


@pytest.mark.parametrize(
    ("tensors", "form", "message"),  # quantised in MXFP4 if it has blocks
    [
        ({"w": (3, 8, 32)}, forms.HALVES, None),
        ({"w": (3, 32, 8)}, forms.TURNED_TURNS, None),
        ({"w": (3, 8, 32)}, forms.TURNED_TURNS, r"'w' must be \[3, 32, 8\] by .*, it is \[3, 8, 32\]"),
        ({"w": (4, 8, 32)}, forms.HALVES, r"'w' must be \[3, 8, 32\] by .*, it is \[4, 8, 32\]"),
        ({"w": (8, 32)}, forms.HALVES, r"'w' must be \[3, 8, 32\]"),
        ({"w_blocks": (3, 8, 1, 16), "w_scales": (3, 8, 1)}, forms.TURNS, None),
        (
            {"w_blocks": (3, 8, 1, 16), "w_scales": (3, 7, 1)},
            forms.TURNS,
            r"'w_scales' must be \[3, 8, 1\] by .*, it is \[3, 7, 1\]",
        ),
        (
            {"w_blocks": (3, 8, 2, 16), "w_scales": (3, 8, 1)},
            forms.TURNS,
            r"'w_blocks' must be \[3, 8, 1, 16\]",
        ),
        (
            {"w_blocks": (1,), "w_scales": (1,)},
            Form("alternate", True),
            r"'w': mxfp4 is not read transposed",
        ),
        ({"w": (3, 8, 32), "dtype": np.uint8}, forms.HALVES, "'w' has dtype U8; supported: F32, "),
        (
            {"w_blocks": (3, 8, 1, 16), "w_scales": (3, 8, 1), "dtype": np.int8},
            forms.TURNS,
            "'w_blocks' has dtype I8; supported: U8",
        ),
    ],
)
def test_shapes_and_dtypes_are_checked_as_they_are_stored(tmp_path, tensors, form, message):
    quantised = MXFP4 if "w_blocks" in tensors else None
    dtype = tensors.pop("dtype", np.uint8 if quantised else np.float32)
    spec = ParamSpec("p", (3, 2, 4, 32), *FLOATS[:1] * 2, SingleDeviceSharding(jax.devices()[0]))
    table = {"p": [StoredParam("w", "p", (e,), e, form, format=quantised) for e in range(3)]}
    with checkpoint_of(tmp_path, {n: np.zeros(s, dtype) for n, s in tensors.items()}) as checkpoint:
        if message is None:
            check_shapes(checkpoint, table, {"p": spec})
            return
        with pytest.raises(ValueError, match=message) as error:
            check_shapes(checkpoint, table, {"p": spec})
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
