"""Each damaged checkpoint file is refused in one line that names the file and the fault."""

import json
import os
import threading

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save
from support.least_time import within
from support.models import hf_tiny

from jmoe.checkpoint.checkpoint import CHUNK, aligned_empty, all_finite
from jmoe.checkpoint.hf.reader import HFCheckpoint
from jmoe.checkpoint.load import read_config
from jmoe.checkpoint.safetensors_file import encode_header, parse_json

FILE = "model.safetensors"
A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
B = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}


def raw(header, data=bytes(16), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


GOOD = raw({"__metadata__": {"format": "pt"}, "a": A, "b": B})
DEEP = b'{"a":' * 50_000 + b"}" * 50_000

DAMAGED = {
    "empty": (b"", "it has 0 bytes"),
    "seven bytes": (b"\0" * 7, "it has 7 bytes"),
    "git-lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "git-LFS pointer",
    ),
    "web page": (b"<!DOCTYPE html><html><body>Not found</body></html>", "HTML or XML page"),
    "pickle": (b"\x80\x04\x95" + bytes(40), "Python pickle"),
    "zip": (b"PK\x03\x04" + bytes(40), "zip archive"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(40), "GGUF file"),
    "json": (b'{"error": "not found"}', "JSON text"),
    "header length of 2^63": (
        raw({"a": A}, length=2**63),
        "header length 9223372036854775808 exceeds the limit",
    ),
    "header beyond the file": (raw({"a": A}, length=1000), "truncated"),
    "header not an object": (raw(b"[1, 2, 3]"), "not a safetensors file"),
    "header cut": (raw(b'{"a": {"dtype"'), "damaged JSON"),
    "header not utf-8": (raw(b'{"\xff\xfe": 1}'), "damaged JSON"),
    "header nested deep": (raw(DEEP), "damaged JSON"),
    "tensor twice": (raw(b'{"a":%b,"a":%b}' % ((json.dumps(A).encode(),) * 2)), "'a' is given twice"),
    "entry not an object": (raw({"a": 5}), "'a' must have exactly dtype, shape and data_offsets"),
    "entry without shape": (raw({"a": {"dtype": "F32", "data_offsets": [0, 8]}}), "must have exactly"),
    "unknown dtype": (raw({"a": A | {"dtype": "F31"}}), "unknown dtype 'F31'"),
    "dtype not a string": (raw({"a": A | {"dtype": ["F32"]}}), "unknown dtype"),
    "negative shape": (raw({"a": A | {"shape": [-2]}}), "shape must be a list of integers >= 0"),
    "boolean shape": (raw({"a": A | {"shape": [True]}}), "shape must be a list of integers >= 0"),
    "shape overflows": (raw({"a": A | {"shape": [2**40, 2**40]}}), "its offsets span 8"),
    "offsets reversed": (raw({"a": A | {"data_offsets": [8, 0]}}), r"must be \[begin, end\]"),
    "offsets of three": (raw({"a": A | {"data_offsets": [0, 8, 8]}}), r"must be \[begin, end\]"),
    "offsets too short": (
        raw({"a": A | {"data_offsets": [0, 4]}}),
        r"F32 \[2\] needs 8 bytes, its offsets span 4",
    ),
    "overlap": (raw({"a": A, "b": A}), "'b' overlaps 'a'"),
    "gap": (raw({"a": A, "b": B | {"data_offsets": [12, 20]}}, bytes(20)), "'b' leaves a gap after 'a'"),
    "gap at the start": (raw({"b": B}), "'b' leaves a gap after the header"),
    "truncated": (
        GOOD[:-5],
        rf"truncated: its header describes {len(GOOD)} bytes, the file has {len(GOOD) - 5}",
    ),
    "bytes after the end": (GOOD + b"!", "bytes after the last tensor"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_file(case, tmp_path):
    data, message = DAMAGED[case]
    (tmp_path / FILE).write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        HFCheckpoint(tmp_path)
    assert str(tmp_path / FILE) in str(error.value)
    assert "\n" not in str(error.value)


def write_index(directory, weight_map, **shards):
    for name, tensors in shards.items():
        (directory / f"{name}.safetensors").write_bytes(save({t: np.zeros(2, np.float32) for t in tensors}))
    text = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(text)


ONE, TWO = "one.safetensors", "two.safetensors"
BAD_INDEX = {
    "not json": ("{", "damaged JSON"),
    "no weight_map": ("{}", "has no weight_map"),
    "empty weight_map": ({}, "has no weight_map"),
    "parent folder": ({"a": "../one.safetensors"}, r"'a' lies in '\.\./one\.safetensors', not a plain"),
    "absolute path": ({"a": "/tmp/one.safetensors"}, "not a plain"),
    "not a string": ({"a": 1}, "not a plain"),
    "another format": ({"a": "one.bin"}, "not a plain"),
    "shard missing": ({"a": ONE, "b": TWO, "c": "three.safetensors"}, r"three\.safetensors: cannot be read"),
    "tensor in no shard": ({"a": ONE, "b": TWO, "c": TWO}, r"two\.safetensors: has no tensor 'c'"),
    "tensor not in index": ({"b": TWO, "x": ONE}, r"one\.safetensors: tensor 'a' is not given to this file"),
    "tensor given to another": (
        {"a": TWO, "b": ONE},
        r"one\.safetensors: tensor 'a' is not given to this file",
    ),
}


@pytest.mark.parametrize("case", BAD_INDEX)
def test_damaged_index(case, tmp_path):
    weight_map, message = BAD_INDEX[case]
    write_index(tmp_path, weight_map, one=["a"], two=["b"])
    with pytest.raises(ValueError, match=message) as error:
        HFCheckpoint(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_tensor_in_two_shards(tmp_path):
    write_index(tmp_path, {"a": ONE, "b": TWO}, one=["a"], two=["a", "b"])
    with pytest.raises(ValueError, match=r"two\.safetensors: tensor 'a' is also in one\.safetensors"):
        HFCheckpoint(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "has no .safetensors file"),
        (["pytorch_model.bin"], r"pytorch_model\.bin: pickled weights can run code .* only \.safetensors"),
        (["model.pth"], "never opened"),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], "incomplete download"),
        (["model.safetensors", "model.safetensors.index.json"], "has both"),
    ],
)
def test_directory_without_one_clear_checkpoint(names, message, tmp_path):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        HFCheckpoint(tmp_path)


def test_what_is_not_a_file(tmp_path):
    (tmp_path / FILE).mkdir()
    with pytest.raises(ValueError, match="not a regular file"):
        HFCheckpoint(tmp_path)
    (tmp_path / FILE).rmdir()
    (tmp_path / FILE).symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="cannot be read"):
        HFCheckpoint(tmp_path)


def test_a_named_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / FILE)
    seen = []

    def attempt():
        try:
            HFCheckpoint(tmp_path)
        except ValueError as error:
            seen.append(str(error))

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(60)
    assert seen
    assert "not a regular file" in seen[0]


def test_a_file_cut_while_it_is_read(tmp_path):
    path = tmp_path / FILE
    path.write_bytes(GOOD)
    with HFCheckpoint(tmp_path) as checkpoint:
        os.truncate(path, len(GOOD) - 4)
        checkpoint.read_into("a", np.empty(2, np.float32))
        with pytest.raises(
            ValueError, match=rf"truncated: {len(GOOD)} bytes are needed, {len(GOOD) - 4} are"
        ):
            checkpoint.read_into("b", np.empty(2, np.float32))


def test_long_tensors_are_read_whole_and_scanned_to_the_end(tmp_path):
    size = CHUNK // 2 * 2 + 3  # two chunks of bfloat16 and a little
    tensor = (np.arange(size) % 251).astype(ml_dtypes.bfloat16)
    (tmp_path / FILE).write_bytes(save({"long": tensor, "none": np.zeros((0, 4), np.float32)}))
    with HFCheckpoint(tmp_path) as checkpoint:
        for dtype in (ml_dtypes.bfloat16, np.float32):
            out = aligned_empty((size,), dtype)
            assert out.ctypes.data % 64 == 0
            checkpoint.read_into("long", out)
            np.testing.assert_array_equal(out, tensor.astype(dtype))
        checkpoint.read_into("none", np.empty((0, 4), np.float32))
        with pytest.raises(ValueError, match=r"'long' is \[\d+\], asked as \[7\]"):
            checkpoint.read_into("long", np.empty(7, np.float32))
    tensor[-1] = np.nan
    (tmp_path / FILE).write_bytes(save({"long": tensor}))
    with HFCheckpoint(tmp_path) as checkpoint, pytest.raises(ValueError, match="'long' has NaN or Inf"):
        checkpoint.read_into("long", aligned_empty((size,), ml_dtypes.bfloat16))


def test_every_bfloat16_is_classified():
    patterns = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    finite = np.isfinite(patterns.astype(np.float32))
    assert all_finite(patterns[finite])
    assert not any(all_finite(patterns[i : i + 1]) for i in np.flatnonzero(~finite))


@given(st.lists(st.floats(width=32), max_size=20))
@settings(max_examples=50, deadline=None)
def test_float32_is_classified_as_numpy_does(floats):
    values = np.array(floats, np.float32)
    assert all_finite(values) == bool(np.isfinite(values).all())


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
@settings(max_examples=150, deadline=None)
def test_a_flipped_byte_is_refused_or_only_changes_values(tmp_path_factory, at, mask):
    directory = tmp_path_factory.mktemp("flip")
    data = bytearray(GOOD)
    data[at] ^= mask
    (directory / FILE).write_bytes(data)
    try:
        with HFCheckpoint(directory) as checkpoint:
            for name, info in checkpoint.tensors.items():
                checkpoint.read_into(name, np.empty(info.shape, np.float32))
    except ValueError as error:
        assert str(directory / FILE) in str(error)


def test_our_header_is_aligned_and_read_by_the_public_reader(tmp_path):
    header = encode_header([("x", "F32", (3,)), ("y", "BF16", (2, 2))])
    assert len(header) % 64 == 0
    (tmp_path / FILE).write_bytes(header + np.arange(3, dtype=np.float32).tobytes() + bytes(8))
    assert load_file(tmp_path / FILE)["x"].tolist() == [0, 1, 2]
    with HFCheckpoint(tmp_path) as checkpoint:
        assert checkpoint.tensors["y"].shape == (2, 2)


def test_helper_writes_every_name_once(tmp_path):
    for architecture in hf_tiny.FAMILIES:
        tensors = hf_tiny.write_checkpoint(tmp_path / architecture, hf_tiny.hf_config(architecture), shards=2)
        with HFCheckpoint(tmp_path / architecture) as checkpoint:
            assert checkpoint.tensors.keys() == tensors.keys()


def test_long_names_and_many_of_them_take_no_longer(tmp_path):
    """A repeated name among many, numbers of thousands of digits and long names take no longer."""
    once = {f"{i:x}": 1 for i in range(200_000)}
    twice = json.dumps(once)[:-1] + ', "7": 2}'

    def find() -> None:
        with pytest.raises(ValueError, match="damaged JSON: '7' is given twice"):
            parse_json(twice.encode(), "it")

    within(5, find, "a second, were the machine quiet")
    digits = "9" * 4000
    shape = f"[{', '.join([digits] * 2000)}]"
    huge = f'{{"dtype": "F32", "shape": {shape}, "data_offsets": [0, 4]}}'
    for name, entry in (("n" * 10_000, "{}"), ("a", huge)):
        header = f'{{"{name}": {entry}}}'.encode()
        (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))

        def refuse() -> None:
            with pytest.raises(ValueError, match="tensor '") as error:
                HFCheckpoint(tmp_path)
            assert len(str(error.value)) < 1000

        within(5, refuse, name[:9])


def test_a_config_of_gigabytes_is_refused_unread(tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(1 << 33)
    with pytest.raises(ValueError, match=r"config\.json: has 8589934592 bytes, more than the limit 16777216"):
        read_config(tmp_path)
