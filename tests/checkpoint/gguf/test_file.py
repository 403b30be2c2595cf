"""A GGUF header is read as the package writes it, and a damaged one is refused in one line."""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.damage import CHANGES, damaged, refused
from support.fuzzing import Reader, fuzz
from support.models import hf_tiny
from support.models.gguf_models import gguf, write_gguf

from jmoe.checkpoint import read_config
from jmoe.checkpoint.gguf.file import open_gguf
from jmoe.checkpoint.load import match, read_param
from jmoe.checkpoint.quantised.codings import read_codings
from jmoe.checkpoint.source import source_of
from jmoe.checkpoint.workers import Workers
from jmoe.config.moe import MoEConfig
from jmoe.engine.text.codec import load_codec
from jmoe.mesh import make_mesh
from jmoe.models.decoder import make_blueprint
from jmoe.server.template.chat_template import load_chat_template

ONE = jax.devices()[:1]
VOCABULARY = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<|end|>"], "tokenizer.ggml.token_type": [1, 1, 1, 3],
    "tokenizer.ggml.eos_token_id": 3, "tokenizer.chat_template": "{{ messages[0].content }}",
}  # fmt: skip


def header(path: Path):
    file, found = open_gguf(path)
    file.close()
    return found


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def file_of(
    tensors: Sequence[tuple[str, tuple[int, ...], int, int]] = (),
    entries: Sequence[bytes] = (),
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    data: int = 256,
) -> bytes:
    """Returns a file; a tensor is (name, sizes, type, offset)."""
    counts = counts or (len(tensors), len(entries))
    raw = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(entries)
    for name, sizes, kind, offset in tensors:
        raw += text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)
    return raw + bytes(-len(raw) % 32) + bytes(data)


def entry(key: str, kind: int, raw: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + raw


def test_a_header_is_as_the_package_reads_it(tmp_path: Path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "qwen3moe")
    values: dict[str, Any] = {
        "a.text": "caf\u00e9", "a.list": ["x", "", "y"], "a.numbers": [1, 2, 3], "a.floats": [0.5, 1.5]
    }  # fmt: skip
    writer.add_string("a.text", values["a.text"])
    for key in ("a.list", "a.numbers", "a.floats"):
        writer.add_array(key, values[key])
    writer.add_float32("a.small", 1e-6)
    writer.add_bool("a.flag", True)
    writer.add_int64("a.wide", -(2**40))
    writer.add_custom_alignment(64)
    rng = np.random.default_rng(0)
    tensors = {"one": rng.random((3, 5), np.float32), "two": rng.random((2, 3, 4), np.float32)}
    for name, numbers in tensors.items():
        writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found, theirs = header(path), gguf.GGUFReader(path)
    own = values | {"a.small": 1e-6, "a.flag": True, "a.wide": -(2**40), "general.alignment": 64}
    assert found.metadata == own | {"general.architecture": "qwen3moe"}
    for tensor in theirs.tensors:
        info = found.tensors[tensor.name]
        assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert info.shape == tensors[tensor.name].shape


F32, Q8_0 = 0, 8
REFUSED = {
    "magic": (b"GGML" + bytes(60), "does not begin with GGUF"),
    "short": (b"GGUF", "not a GGUF file"),
    "future": (file_of(version=4), r"has GGUF version 4; versions 2 and 3 are read"),
    "first version": (file_of(version=1), r"has GGUF version 1"),
    "big endian": (file_of(version=3 << 24), "is big endian"),
    "many tensors": (file_of(counts=(2**40, 0)), r"the number of tensors is 1099511627776; .* the limit is"),
    "many entries": (file_of(counts=(0, 60000)), r"metadata entries is 60000; 264 bytes are left"),
    "value type": (file_of(entries=[entry("k", 13, bytes(4))]), r"'k' has the value type 13"),
    "nested arrays": (
        file_of(entries=[entry("k", 9, struct.pack("<IQ", 9, 1))]),
        r"'k' is an array of the value type 9",
    ),
    "long array": (
        file_of(entries=[entry("k", 9, struct.pack("<IQ", 4, 2**50))]),
        r"the length of 'k' is 1125899906842624",
    ),
    "long text": (file_of(entries=[entry("k", 8, struct.pack("<Q", 2**62))]), r"truncated: 'k' needs"),
    "key twice": (file_of(entries=[entry("k", 0, b"\1")] * 2), r"has 'k' twice"),
    "alignment": (
        file_of(entries=[entry("general.alignment", 4, struct.pack("<I", 48))]),
        r"general.alignment must be a power of two to 65536, got 48",
    ),
    "tensor twice": (file_of([("t", (4,), F32, 0)] * 2), r"'t' is there twice"),
    "axes": (file_of([("t", (1,) * 9, F32, 0)]), r"'t' has 9 axes; the limit is 4"),
    "no size": (file_of([("t", (4, 0), F32, 0)]), r"'t' has the sizes \[0, 4\]"),
    "sizes": (file_of([("t", (2**40, 2**40), F32, 0)]), r"'t' has the sizes"),
    "type": (file_of([("t", (4,), 99, 0)]), r"'t' has the type 99, which is unknown"),
    "cut block": (file_of([("t", (40,), Q8_0, 0)]), r"rows of 40 numbers, Q8_0 has blocks of 32"),
    "offset": (file_of([("t", (4,), F32, 8)]), r"offset 8, not a multiple of the alignment 32"),
    "overlap": (
        file_of([("t", (16,), F32, 0), ("u", (4,), F32, 32)]),
        r"'u' begins at 32, before the end of the tensor before it, 64",
    ),
    "truncated": (file_of([("t", (256,), F32, 0)]), r"'t' ends at byte \d+, the file has"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_header_is_refused(name: str, tmp_path: Path):
    raw, message = REFUSED[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=message) as error:
        header(path)
    assert refused(error.value, path)


def test_types_and_architectures_that_are_not_read_are_refused_by_name(tmp_path: Path):
    path = tmp_path / "m.gguf"
    q2_k = 10
    path.write_bytes(file_of([("blk.0.attn_q.weight", (256,), q2_k, 0)]))
    with pytest.raises(ValueError, match=r"'blk.0.attn_q.weight' has type Q2_K, .*; F32, .* MXFP4 are"):
        read_config(path)
    path.write_bytes(file_of(entries=[entry("general.architecture", 8, text("llama4"))]))
    with pytest.raises(ValueError, match=r"architecture 'llama4' is not read from GGUF; qwen3moe, .* are"):
        read_config(path)
    path.write_bytes(file_of(entries=[entry("general.architecture", 8, text("llama"))]))
    with pytest.raises(ValueError, match=r"m.gguf: .*llama.attention.head_count"):
        read_config(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with blocks, a tokenizer and a template."""
    folder = tmp_path_factory.mktemp("gguf")
    sizes = {"hidden_size": 32, "vocab_size": 4, "num_hidden_layers": 1, "moe_intermediate_size": 32}
    hf_tiny.write_checkpoint(folder / "hf", hf_tiny.hf_config(**sizes, num_local_experts=4))

    def types(name: str, numbers: np.ndarray) -> str:
        return "Q8_0" if "exps" in name else "MXFP4" if "attn_q.weight" in name else "F32"

    write_gguf(folder / "hf", folder / "m.gguf", types, VOCABULARY)
    return folder / "m.gguf"


def read_all(path: Path) -> None:
    """Does everything that a start does, except to put arrays on devices."""
    cfg = read_config(path)
    blueprint = make_blueprint(cfg, MoEConfig(), make_mesh(devices=ONE), read_codings(path, cfg))
    with source_of(path).open() as checkpoint, Workers() as workers:
        _, specs, table = match(checkpoint, blueprint, own_dtypes=True)
        for name, spec in specs.items():
            read_param(checkpoint, spec, table[name], workers)
    load_codec(path, cfg.vocab_size)
    load_chat_template(path)


def test_damage_anywhere_is_read_or_refused_in_one_line(model: Path, tmp_path: Path):
    read_all(model)
    good, path = model.read_bytes(), tmp_path / "m.gguf"

    @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(CHANGES, min_size=1, max_size=3))
    def check(changes: list[tuple]) -> None:
        path.write_bytes(damaged(good, changes))
        try:
            read_all(path)
        except ValueError as error:
            assert "\n" not in str(error)

    check()


@pytest.mark.fuzz
def test_damage_for_half_a_minute(model: Path, tmp_path: Path):
    reader = Reader("gguf", {"m.gguf": model.read_bytes()}, lambda folder: read_all(folder / "m.gguf"))
    assert fuzz(reader, tmp_path, count=10_000, seconds=30.0)


@pytest.mark.parametrize("name", ["Q8_0", "MXFP4"])
def test_a_scale_that_is_no_number_is_refused(name: str, model: Path, tmp_path: Path):
    raw = bytearray(model.read_bytes())
    info = next(info for info in header(model).tensors.values() if info.dtype == name)
    raw[info.offset : info.offset + 2] = b"\xff\xff"
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"m.gguf: tensor 'blk.0.*' has .*NaN") as error:
        read_all(path)
    assert refused(error.value, path)
