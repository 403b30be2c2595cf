"""GPTQ's and AWQ's packings are read bit for bit, and what contradicts itself is refused in one line."""

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from jmoe_kernels.quantised import Coding, Quantised, dequantised
from support.models import word_packings as words
from support.models.quantised_pair import assert_equal_logits, load, opened, rewrite, write_pair

from jmoe.checkpoint.hf.reader import HFCheckpoint
from jmoe.checkpoint.layouts import entries
from jmoe.checkpoint.quantised.formats import StoredParam
from jmoe.checkpoint.quantised.formats.awq import Awq
from jmoe.checkpoint.quantised.formats.format import Format
from jmoe.checkpoint.quantised.formats.gptq import Gptq
from jmoe.checkpoint.quantised.quantisation import read_quantisation

SHAPE = (24, 64)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True}
AWQ = {
    "quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm",
    "modules_to_not_convert": ["mlp.gate"],
}  # fmt: skip


def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def found(checkpoint: HFCheckpoint, stored: Format) -> Format:
    """Returns a format with what the tensors say, as loading finds it."""
    return stored.of_tensors("x.weight", checkpoint.tensors).of_contents(checkpoint, "x.weight")


def read(directory: Path, stored: Format, tensors: dict[str, np.ndarray], shape=SHAPE) -> Quantised:
    """Returns a weight after the checks that loading makes."""
    with opened(directory, tensors) as checkpoint:
        stored = found(checkpoint, stored)
        for entry in entries(StoredParam("x.weight", "p", format=stored), shape):
            assert checkpoint.tensors[entry.name].shape == entry.shape
            assert checkpoint.tensors[entry.name].dtype in entry.dtypes
        return stored.read(checkpoint, "x.weight", None, shape)


def assert_bits(got: Quantised, want: np.ndarray) -> None:
    np.testing.assert_array_equal(dequantised(got), want)


@pytest.mark.parametrize("group", [16, 32, 64, 128, 48, -1])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("less_one", [True, False])
def test_gptq_is_read_bit_for_bit(tmp_path, bits, sym, group, less_one):
    weight = words.random_codes(rng(), SHAPE, bits, group, sym)
    stored = Gptq(bits, None if group == -1 else group, sym, stores_less_one=less_one)
    got = read(tmp_path, stored, words.gptq(weight, less_one=less_one, g_idx=group != 16))
    assert_bits(got, weight.numbers)
    code = {4: "int4", 8: "int8"}[bits]
    kept = Coding(code, stored.group, "float16" if sym else "float32", has_lows=not sym)
    assert got.coding == stored.coding == kept
    assert got.values.nbytes == bits * weight.codes.size // 8 and got.scales.dtype == kept.scales


@pytest.mark.parametrize("group", [16, 64, -1])
@pytest.mark.parametrize("sym", [True, False])
def test_awq_is_read_bit_for_bit(tmp_path, sym, group):
    weight = words.random_codes(rng(), SHAPE, 4, group, sym)
    stored = Awq(None if group == -1 else group, sym)
    got = read(tmp_path, stored, words.awq(weight))
    assert_bits(got, weight.numbers)
    assert got.coding == stored.coding
    assert got.coding == Coding("int4", stored.group, "float16" if sym else "float32", not sym)


@pytest.mark.parametrize(("dtype", "kept"), [(ml_dtypes.bfloat16, "bfloat16"), (np.float32, "float32")])
def test_symmetric_scales_keep_the_dtype_of_the_file(tmp_path, dtype, kept):
    weight = words.random_codes(rng(), SHAPE)
    weight = replace(weight, scales=weight.scales.astype(dtype))
    for stored, tensors in ((Gptq(4, 16, True), words.gptq(weight)), (Awq(16, True), words.awq(weight))):
        got = read(tmp_path, stored, tensors)
        assert got.coding == Coding("int4", 16, kept)
        assert_bits(got, weight.numbers)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_columns_in_another_order_are_read_but_not_kept_coded(tmp_path, bits, sym):
    stored = Gptq(bits, 16, sym, has_any_order=True)
    weight = words.random_codes(rng(), SHAPE, bits, 16, sym)
    with opened(tmp_path, words.gptq(weight)) as checkpoint:
        now = found(checkpoint, stored)
        assert now.coding == replace(stored, has_any_order=False).coding
    other = words.shuffled(weight, rng())
    with opened(tmp_path, words.gptq(other)) as checkpoint:
        now = found(checkpoint, stored)
        assert now.coding is None
        assert_bits(now.read(checkpoint, "x.weight", None, SHAPE), other.numbers)


def test_biases_of_zeros_that_the_model_does_not_have_are_not_read(tmp_path):
    """Old releases of AutoGPTQ write one for every layer that they quantise."""

    def write(module: str, shape: tuple[int, int]):
        weight = words.random_codes(rng(), shape)
        return words.gptq(weight) | {"bias": np.zeros(shape[0], np.float16)}, weight.numbers

    tensors = write_pair(tmp_path, GPTQ, write)
    assert_equal_logits(tmp_path)
    name = "model.layers.1.self_attn.q_proj.bias"
    tensors[name][5] = -0.5
    rewrite(tmp_path / "coded", tensors)
    with pytest.raises(ValueError, match=rf"'{name}' has the number -0.5; the model has no such bias"):
        load(tmp_path / "coded")
    tensors["model.layers.1.mlp.gate.bias"] = tensors.pop(name) * 0  # of a plain layer
    rewrite(tmp_path / "coded", tensors)
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.gate.bias' is not one of Qwen3Moe"):
        load(tmp_path / "coded")


def _with(weight: words.Codes, changes: dict, pack=words.gptq) -> dict[str, np.ndarray]:
    tensors = pack(weight)
    for part, (at, value) in changes.items():
        tensors[part][at] = value
    return tensors


@pytest.mark.parametrize(
    ("stored", "changes", "message"),
    [
        (Gptq(4, 16, True), {"scales": ((1, 3), np.nan)}, r"'x.scales' has a scale that is NaN or Inf"),
        (Gptq(4, 16, True), {"qzeros": ((1, 0), 0x77777767)}, r"'x.qzeros' has the zero 7; .* zero is 8"),
        (Gptq(4, 16, True, False), {}, r"'x.qzeros' has the zero 7; .* zero is 8"),
        (Gptq(4, 16, True), {"g_idx": (0, 1)}, r"'x.g_idx' puts .* different groups, but desc_act is false"),
        (Gptq(4, 16, True, True, True), {"g_idx": (5, 4)}, r"'x.g_idx' has the group 4, there are 4"),
        (Gptq(4, 16, True, True, True), {"g_idx": (5, -1)}, r"'x.g_idx' has the group -1, there are 4"),
    ],
)  # fmt: skip
def test_contradictions_of_gptq_are_refused(tmp_path, stored, changes, message):
    tensors = _with(words.random_codes(rng(), SHAPE), changes)
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, stored, tensors)
    assert str(tmp_path / "model.safetensors") in str(error.value) and "\n" not in str(error.value)


def test_contradictions_of_awq_are_refused(tmp_path):
    weight = words.random_codes(rng(), SHAPE)
    with pytest.raises(ValueError, match=r"'x.qzeros' has the zero 9; .* zero is 8"):
        read(tmp_path, Awq(16, True), _with(weight, {"qzeros": ((0, 0), 0x78888889)}, words.awq))
    with pytest.raises(ValueError, match=r"'x.scales' has a scale that is NaN"):
        read(tmp_path, Awq(16, True), _with(weight, {"scales": ((0, 0), np.inf)}, words.awq))


@pytest.mark.parametrize("stored", [Gptq(4, 16, True), Gptq(8, 16, True), Awq(16, True)])
def test_sizes_that_words_do_not_hold_are_refused(stored):
    for shape in ((24, 62), (22, 64)):
        with pytest.raises(ValueError, match=r"'x.weight': (62|22) numbers do not fill words of [48]$"):
            stored.entries("x.weight", shape)
    with pytest.raises(ValueError, match=r"\[2, 24, 64\] is no matrix"):
        stored.entries("x.weight", (2, 24, 64))


MODELS = {  # name -> quantization_config, and how a weight becomes tensors
    "v1": (GPTQ, words.gptq, {}),
    "v1 asymmetric": (GPTQ | {"sym": False}, words.gptq, {"sym": False}),
    "v2": (GPTQ | {"checkpoint_format": "gptq_v2"}, lambda w: words.gptq(w, less_one=False), {}),
    "v2 asymmetric": (
        GPTQ | {"checkpoint_format": "gptq_v2", "sym": False},
        lambda w: words.gptq(w, less_one=False), {"sym": False},
    ),
    "8 bits": (GPTQ | {"bits": 8, "group_size": -1}, words.gptq, {"bits": 8, "group": -1}),
    "desc_act": (GPTQ | {"desc_act": True}, words.gptq, {}),
    "awq": (AWQ, words.awq, {"sym": False}),
    "awq symmetric": (AWQ | {"zero_point": False}, words.awq, {}),
    "auto-round in gptq": (
        {
            "quant_method": "auto-round", "bits": 4, "group_size": 16, "sym": True, "data_type": "int",
            "packing_format": "auto_round:auto_gptq", "block_name_to_quantize": "model.layers",
        },
        lambda w: words.gptq(w, g_idx=False), {},
    ),
    "auto-round in awq": (
        {
            "quant_method": "auto-round", "bits": 4, "group_size": 16, "sym": False,
            "packing_format": "auto_round:auto_awq",
        },
        words.awq, {"sym": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_as_its_dequantised_copy(tmp_path, name, caplog):
    config, pack, kind = MODELS[name]
    generator = rng()

    def write(module, shape):
        weight = words.random_codes(generator, shape, **{"group": 16} | kind)
        return pack(weight), weight.numbers

    write_pair(tmp_path, config, write)
    assert_equal_logits(tmp_path)
    assert "plain numbers" not in caplog.text
    model = load(tmp_path / "coded")
    assert isinstance(model.layers[0].moe.experts.down_EDF[...], Quantised)
    assert isinstance(model.layers[1].attention.q_proj[...], Quantised)


def test_a_module_in_another_order_is_dequantised_and_the_others_stay(tmp_path, caplog):
    generator = rng()

    def write(module, shape):
        weight = words.random_codes(generator, shape)
        if module == "model.layers.0.self_attn.q_proj" or "1.mlp.experts.3.down" in module:
            weight = words.shuffled(weight, generator)
        return words.gptq(weight), weight.numbers

    write_pair(tmp_path, GPTQ | {"desc_act": True}, write)
    assert_equal_logits(tmp_path)
    [note] = {record.getMessage() for record in caplog.records if "plain numbers" in record.getMessage()}
    assert (
        "2 quantised parameters become plain numbers in memory, such as 'layers.0.attention.q_proj'" in note
        and "desc_act: g_idx" in note
    )
    model = load(tmp_path / "coded")
    kinds = {
        (layer, path): isinstance(param[...], Quantised)
        for layer in (0, 1)
        for path, param in (
            ("q", model.layers[layer].attention.q_proj),
            ("down", model.layers[layer].moe.experts.down_EDF),
        )
    }
    assert kinds == {(0, "q"): False, (1, "q"): True, (0, "down"): True, (1, "down"): False}


def test_bits_by_module(tmp_path):
    """Attention has 8 bits and a layer stays plain, by the rules of GPTQ and of AutoRound."""
    generator = rng()

    def write(module, shape):
        if ".1.self_attn." in module:
            return None
        bits = 8 if "self_attn" in module else 4
        weight = words.random_codes(generator, shape, bits)
        return words.gptq(weight), weight.numbers

    plain = {f"model.layers.1.self_attn.{p}_proj": {"bits": 16, "data_type": "fp"} for p in "qk"}
    for number, config in enumerate(
        (
            GPTQ | {"dynamic": {r"-:.*\.1\.self_attn\..*": {}, r"+:.*self_attn.*": {"bits": 8}}},
            {
                "quant_method": "auto-round", "bits": 4, "group_size": 16, "sym": True,
                "extra_config": plain | {
                    r".*layers\.1\.self_attn\.[vo]_proj": {"bits": 16},
                    "model.layers.0.self_attn": {"bits": 8},
                },
            },
        )
    ):  # fmt: skip
        root = tmp_path / str(number)
        write_pair(root, config, write)
        assert_equal_logits(root)


def test_a_truncated_scale_and_a_wrong_shape_are_refused(tmp_path):
    generator = rng()

    def write(module, shape):
        weight = words.random_codes(generator, shape)
        return words.gptq(weight), weight.numbers

    tensors = write_pair(tmp_path, GPTQ, write)
    name = "model.layers.1.mlp.experts.2.up_proj"
    for part, wrong, message in (
        (
            "scales",
            np.ones((4, 32), np.float16),
            r"scales' must be \[2, 32\] by config.json, it is \[4, 32\]",
        ),
        ("qweight", np.zeros((8, 32), np.int32), r"qweight' must be \[4, 32\]"),
        ("g_idx", np.zeros(31, np.int32), r"g_idx' must be \[32\]"),
        ("qzeros", np.zeros((2, 4), np.uint8), r"qzeros' has dtype U8; supported: I32"),
        ("scales", np.ones((2, 32), np.int8), r"scales' has dtype I8; supported: F16, BF16, F32"),
    ):
        rewrite(tmp_path / "coded", tensors | {f"{name}.{part}": wrong})
        with pytest.raises(ValueError, match=message) as error:
            load(tmp_path / "coded")
        assert "model.safetensors" in str(error.value) and "\n" not in str(error.value)
    rewrite(tmp_path / "coded", {n: t for n, t in tensors.items() if n != f"{name}.qzeros"})
    with pytest.raises(ValueError, match=rf"tensor '{name}.qzeros'.* is missing"):
        load(tmp_path / "coded")
    assert read_quantisation(tmp_path / "coded").rules
