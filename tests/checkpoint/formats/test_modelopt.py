"""modelopt's checkpoints are read bit for bit, by either of their two files, which must agree."""

import json
from pathlib import Path

import numpy as np
import pytest
from jmoe_kernels.quantised import Coding, Quantised, dequantised
from support.models import modelopt_files as files
from support.models.quantised_pair import assert_equal_logits, load, opened, rewrite, write_pair

from jmoe.checkpoint.quantised.formats.format import Format
from jmoe.checkpoint.quantised.formats.fp8 import Fp8
from jmoe.checkpoint.quantised.formats.nvfp4 import Nvfp4
from jmoe.checkpoint.quantised.methods.modelopt import READ
from jmoe.checkpoint.quantised.quantisation import Quantisation, read_quantisation

TWIN = "hf_quant_config.json"
WRITERS = {"NVFP4": files.nvfp4, "W4A16_NVFP4": files.nvfp4, "FP8": files.fp8, "MXFP8": files.mxfp8}
CODINGS = {
    "NVFP4": Coding("e2m1", 16),
    "W4A16_NVFP4": Coding("e2m1", 16),
    "FP8": Coding("e4m3", None),
    "MXFP8": Coding("e4m3", 32, "uint8"),
}


def format_of(said: Quantisation, module: str) -> Format | None:
    rule = said.rule_of(f"{module}.weight")
    return None if rule is None else rule.format


@pytest.mark.parametrize("algorithm", READ)
def test_a_weight_is_read_bit_for_bit(tmp_path, algorithm):
    stored = READ[algorithm][0]
    tensors, want = WRITERS[algorithm](np.random.default_rng(5), (24, 64))
    with opened(tmp_path, tensors) as checkpoint:
        for entry in stored.entries("x.weight", (24, 64)):
            info = checkpoint.tensors[entry.name]
            assert (info.shape or (1,)) == entry.shape and info.dtype in entry.dtypes
        got = stored.read(checkpoint, "x.weight", None, (24, 64))
    assert got.coding == stored.coding == CODINGS[algorithm]
    np.testing.assert_array_equal(dequantised(got), want)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("weight_scale", np.nan, r"'x.weight_scale' has a scale that is NaN or Inf"),
        ("weight_scale_2", np.inf, r"'x.weight_scale_2' has a scale that is NaN or Inf"),
    ],
)
def test_scales_that_are_no_numbers_are_refused(tmp_path, part, value, message):
    tensors, _ = files.nvfp4(np.random.default_rng(5), (24, 64))
    tensors[part] = np.full_like(tensors[part], value)
    with opened(tmp_path, tensors) as checkpoint, pytest.raises(ValueError, match=message):
        READ["NVFP4"][0].read(checkpoint, "x.weight", None, (24, 64))
    with pytest.raises(ValueError, match=r"'x.weight': rows of 24 do not split into .* of 16$"):
        READ["NVFP4"][0].entries("x.weight", (64, 24))


def nvfp4_config(**changes) -> dict:
    return {
        "quant_method": "modelopt", "quant_algo": "NVFP4", "producer": {"name": "modelopt"},
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "ignore": ["lm_head", "model.layers.0.self_attn*", "model.layers.*.mlp.gate"],
    } | changes  # fmt: skip


def twin_of(**changes) -> dict:
    inner = {
        "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16,
        "exclude_modules": ["lm_head", "model.layers.0.self_attn*", "model.layers.*.mlp.gate"],
    }  # fmt: skip
    return {"producer": {"name": "modelopt", "version": "0.33.0"}, "quantization": inner | changes}


MIXED = {
    "quant_algo": "MIXED_PRECISION",
    "quantized_layers": {
        f"model.layers.{layer}.{module}": {"quant_algo": algorithm} | extra
        for layer in (0, 1)
        for module, algorithm, extra in (
            ("self_attn.q_proj", "FP8", {}),
            ("self_attn.k_proj", "MXFP8", {"group_size": 32}),
            ("self_attn.v_proj", "UNQUANTIZED", {}),
            ("mlp.experts", "W4A16_NVFP4", {"group_size": 16}),
            ("mlp.experts.3.down_proj", "FP8", {}),
        )
    },
}


def write_mixture(module: str, shape: tuple[int, int]):
    by_module = MIXED["quantized_layers"]
    whole = module.rpartition(".experts.")[0] + ".experts"
    own = by_module.get(module, by_module.get(whole, {"quant_algo": "UNQUANTIZED"}))
    writer = WRITERS.get(own["quant_algo"])
    return writer and writer(np.random.default_rng(len(module) + shape[0]), shape)


@pytest.mark.parametrize("where", ["config.json", TWIN, "both"])
def test_a_model_in_nvfp4_computes_as_its_dequantised_copy(tmp_path, where):
    rng = np.random.default_rng(6)

    def write(module, shape):
        return None if ".0.self_attn" in module else files.nvfp4(rng, shape)

    config = nvfp4_config() if where != TWIN else {}
    tensors = write_pair(tmp_path, config, write, "bfloat16")
    scale = np.array(0.1, np.float32)  # of cached keys, which is not about the weights
    rewrite(tmp_path / "coded", tensors | {"model.layers.0.self_attn.k_proj.k_scale": scale})
    if where != "config.json":
        (tmp_path / "coded" / TWIN).write_text(json.dumps(twin_of()))
    assert_equal_logits(tmp_path)
    model = load(tmp_path / "coded")
    assert isinstance(model.layers[0].moe.experts.gate_up_E2FD[...], Quantised)
    assert isinstance(model.layers[1].attention.k_proj[...], Quantised)
    assert not isinstance(model.layers[0].attention.k_proj[...], Quantised)


def test_a_mixture_computes_as_its_dequantised_copy(tmp_path, caplog):
    """A stack of experts that are not all in one form is dequantised, and a line says so."""
    config = {"quant_method": "modelopt", "ignore": []} | MIXED
    write_pair(tmp_path, config, write_mixture, "bfloat16")
    assert_equal_logits(tmp_path)
    assert "2 quantised parameters become plain numbers in memory, such as 'layers.0.moe" in caplog.text
    assert "stored in several ways" in caplog.text
    layer = load(tmp_path / "coded").layers[1]
    kept = {
        "q": layer.attention.q_proj,
        "k": layer.attention.k_proj,
        "v": layer.attention.v_proj,
        "gate_up": layer.moe.experts.gate_up_E2FD,
        "down": layer.moe.experts.down_EDF,
    }
    codes = {name: getattr(param[...], "coding", None) for name, param in kept.items()}
    assert codes == {
        "q": Coding("e4m3", None), "k": Coding("e4m3", 32, "uint8"), "v": None,
        "gate_up": Coding("e2m1", 16), "down": None,
    }  # fmt: skip


def said(directory: Path, config: dict | None = None, twin: dict | None = None) -> Quantisation:
    stated = {} if config is None else {"quantization_config": config}
    (directory / "config.json").write_text(json.dumps(stated))
    if twin is not None:
        (directory / TWIN).write_text(json.dumps(twin))
    return read_quantisation(directory)


def test_qwen3_235b_of_nvidia_says_it_in_the_twin_alone(tmp_path):
    """nvidia/Qwen3-235B-A22B-NVFP4: config.json has no quantization_config."""
    exclude = ["lm_head", *(f"model.layers.{i}.mlp.gate" for i in range(94))]
    found = said(tmp_path, None, twin_of(exclude_modules=exclude))
    assert found.source == "hf_quant_config.json's quantization"
    nvfp4 = Nvfp4("_scale", "_scale_2", multiplies=True)
    assert format_of(found, "model.layers.93.mlp.experts.127.gate_proj") == nvfp4
    assert format_of(found, "model.layers.7.self_attn.q_proj") == nvfp4
    assert format_of(found, "model.layers.93.mlp.gate") is None and format_of(found, "lm_head") is None


def test_qwen36_35b_of_nvidia_is_a_mixture(tmp_path):
    """nvidia/Qwen3.6-35B-A3B-NVFP4: 130 modules in FP8 and 161 in W4A16_NVFP4, both files say so."""
    prefix = "model.language_model.layers"
    fp8 = [
        f"{prefix}.{i}.{name}"
        for i in range(40)
        for name in (
            [f"self_attn.{p}_proj" for p in "qkvo"]
            if i % 4 == 3
            else [f"linear_attn.{p}" for p in ("in_proj_qkv", "in_proj_z", "out_proj")]
        )
    ]
    shared = [f"shared_expert.{p}_proj" for p in ("gate", "up", "down")]
    nvfp4 = [f"{prefix}.{i}.mlp.{name}" for i in range(40) for name in ("experts", *shared)]
    layers = {name: {"quant_algo": "FP8"} for name in fp8}
    layers |= {name: {"quant_algo": "W4A16_NVFP4", "group_size": 16} for name in [*nvfp4, "lm_head"]}
    assert (len(fp8), len(nvfp4) + 1) == (130, 161)
    mixed = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    config = {"quant_method": "modelopt", "ignore": ["mtp*", "mtp.layers.0*"], **mixed}
    twin = {"kv_cache_quant_algo": "FP8", "exclude_modules": ["mtp*", "mtp.layers.0*"], **mixed}
    found = said(tmp_path, config, {"quantization": twin})
    four, eight = Nvfp4("_scale", "_scale_2", multiplies=True), Fp8((None, None), "_scale")
    assert format_of(found, "model.layers.3.self_attn.q_proj") == eight
    assert format_of(found, "model.language_model.layers.0.linear_attn.out_proj") == eight
    assert format_of(found, "model.layers.39.mlp.experts.255.down_proj") == four
    assert format_of(found, "model.layers.39.mlp.shared_expert.up_proj") == four
    assert format_of(found, "lm_head") == four
    for plain in ("model.layers.0.mlp.gate", "model.layers.0.mlp.shared_expert_gate", "model.embed_tokens"):
        assert found.rule_of(f"{plain}.weight") is None
    assert format_of(found, "mtp.layers.0.mlp.experts.0.up_proj") is None


def test_twenty_thousand_names_are_looked_up_at_once(tmp_path):
    """nvidia/MiniMax-M3-NVFP4 names every expert."""
    layers = {
        f"model.layers.{i}.block_sparse_moe.experts.{e}.{w}": {"quant_algo": "NVFP4"}
        for i in range(57) for e in range(128) for w in ("w1", "w2", "w3")
    }  # fmt: skip
    layers |= {
        f"model.layers.{i}.self_attn.{p}_proj": {"quant_algo": "MXFP8"} for i in range(57) for p in "qkvo"
    }
    found = said(
        tmp_path,
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers},
    )
    kinds = [format_of(found, module) for module in layers]
    assert sum(isinstance(kind, Nvfp4) for kind in kinds) == 57 * 128 * 3
    assert sum(isinstance(kind, Fp8) for kind in kinds) == 57 * 4


def test_a_checkpoint_whose_cache_alone_is_quantised_is_plain(tmp_path):
    assert said(tmp_path, None, twin_of(quant_algo=None)).rules == ()


@pytest.mark.parametrize(
    ("config", "twin", "message"),
    [
        (nvfp4_config(quant_algo="NVFP4_AWQ"), None, r"quant_algo 'NVFP4_AWQ' is not read; read: 'NVFP4', "),
        (None, twin_of(quant_algo="W4A8_AWQ"), r"hf_quant_config.json: quantization: quant_algo 'W4A8_AWQ' "),
        (nvfp4_config(group_size=32), None, r"group_size 32 is not read for NVFP4, 16 is"),
        (nvfp4_config(quant_algo="MIXED_PRECISION"), None, r"quantized_layers is absent"),
        (
            nvfp4_config(quant_algo="MIXED_PRECISION", quantized_layers={"a": {"quant_algo": "FP8_PB_WO"}}),
            None, r"quantized_layers: 'a': quant_algo 'FP8_PB_WO' is not read",
        ),
        (
            nvfp4_config(quant_algo="MIXED_PRECISION", quantized_layers={"a": 7}),
            None, r"quantized_layers: 'a': it must be an object, got 7",
        ),
        (nvfp4_config(ignore=7), None, r"ignore must be a list of names, got 7"),
        (nvfp4_config(), twin_of(quant_algo="FP8"), r"quant_algo is 'NVFP4', but .*hf_quant_.* says 'FP8'"),
        (
            nvfp4_config(), twin_of(exclude_modules=["lm_head"]),
            r"config.json: .*ignore and hf_quant_config.json differ: only quantization_config lists 'model",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128]}, twin_of(),
            r"config.json: .*quant_method is 'fp8', but .*hf_quant_config.json is of 'modelopt'",
        ),
        (None, {"producer": {}}, r"hf_quant_config.json: quantization: it must be an object, it is None"),
    ],
)  # fmt: skip
def test_what_is_not_read_or_contradicts_itself_is_refused(tmp_path, config, twin, message):
    with pytest.raises(ValueError, match=message) as error:
        said(tmp_path, config, twin)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
