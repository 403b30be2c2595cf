"""Files that the packages' own quantisers write are read with the numbers that the packages read from them.

The packages (the extra ``quantisers``) need an environment of their own, which ``.ci/long`` makes.
``tests/checkpoint/gguf`` compares every type of GGUF with the ``gguf`` package, which all tests have.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.models.quantised import plain_values, quantised_paths

from jmoe.checkpoint import load_model
from jmoe.mesh import make_mesh

torch = pytest.importorskip("torch", reason="needs the quantisers extra")
llmcompressor = pytest.importorskip("llmcompressor", reason="needs the quantisers extra")
pytest.importorskip("modelopt", reason="needs the quantisers extra")
import compressed_tensors.quantization as ct  # noqa: E402
import modelopt.torch.quantization as mtq  # noqa: E402
from compressed_tensors.compressors import BaseCompressor  # noqa: E402
from llmcompressor.modifiers.quantization import QuantizationModifier  # noqa: E402
from modelopt.torch.export import export_hf_checkpoint  # noqa: E402
from modelopt.torch.quantization.qtensor import NVFP4QTensor  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM  # noqa: E402

pytestmark = pytest.mark.parity
Tensors = dict[str, Any]  # of a checkpoint, by name
IGNORED = ["lm_head", "re:.*mlp.gate$"]


def scheme(target: str, bits: int, group: int, **changes: Any) -> dict[str, Any]:
    weights = ct.QuantizationArgs(
        num_bits=bits, type="int", strategy="group", group_size=group, symmetric=True, **changes
    )
    return {"config_groups": {"group_0": ct.QuantizationScheme(targets=[target], weights=weights)}}


SCHEMES = {
    name: {"targets": "Linear", "scheme": name}
    for name in (
        "W4A16", "W4A16_ASYM", "W8A16", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4A16", "MXFP8A16"
    )
} | {
    "experts in int4 g32": scheme("re:.*mlp.experts.*", 4, 32),
    "int8 g64": scheme("Linear", 8, 64),
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Writes a tiny model that blocks of 128 x 128 cut and groups of 128 do not."""
    torch.manual_seed(0)
    cfg = Qwen3MoeConfig(
        vocab_size=96, hidden_size=128, intermediate_size=128, moe_intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=2,
        max_position_embeddings=128, tie_word_embeddings=False, norm_topk_prob=True, initializer_range=0.1,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("source")
    Qwen3MoeForCausalLM(cfg).to(torch.bfloat16).save_pretrained(directory)
    return directory


def assert_same_numbers(
    directory: Path, dequantised: Callable[[str, Tensors], Any], tolerance: float = 0.0
) -> set[str]:
    """Asserts that jmoe reads a directory's weights as the package does; returns the quantised parameters.

    dequantised: function of a module's name and its tensors that returns the package's numbers.
    tolerance: largest difference relative to each number.
    """
    stored = load_file(directory / "model.safetensors")
    modules = {name.rpartition(".")[0] for name in stored if name.endswith(".weight_scale")}
    plain = {n: t.float().contiguous() for n, t in stored.items() if n.rpartition(".")[0] not in modules}
    for module in sorted(modules):
        own = {n.rpartition(".")[2]: t for n, t in stored.items() if n.rpartition(".")[0] == module}
        plain[f"{module}.weight"] = dequantised(module, own).float().contiguous()
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    copy = directory / "plain"
    copy.mkdir()
    (copy / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    save_file(plain, copy / "model.safetensors", {"format": "pt"})
    ours = load_model(directory, make_mesh(), dtype="float32")
    got, want = plain_values(ours), plain_values(load_model(copy, make_mesh()))
    assert got.keys() == want.keys()
    for path, numbers in want.items():
        np.testing.assert_allclose(got[path], numbers, rtol=tolerance, atol=0, err_msg=path)
    return quantised_paths(ours)


@pytest.mark.parametrize("name", SCHEMES)
def test_what_llmcompressor_writes(name: str, source: Path, tmp_path: Path):
    """compressed-tensors multiplies NVFP4 in bfloat16; every other number is equal."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    llmcompressor.oneshot(model=model, recipe=QuantizationModifier(**SCHEMES[name], ignore=IGNORED))
    model.save_pretrained(tmp_path, save_compressed=True)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    group = dict(config["config_groups"]["group_0"])
    kind = group.pop("format", None) or config["format"]
    compressor = BaseCompressor.get_value_from_registry(kind)

    def dequantised(module: str, tensors: Tensors) -> Any:
        wide = {
            n: t.float() if n == "weight_scale" and t.dtype == torch.bfloat16 else t
            for n, t in tensors.items()
        }
        return compressor.decompress(wide, ct.QuantizationScheme.model_validate(group))["weight"]

    found = assert_same_numbers(tmp_path, dequantised, 2**-7 if name == "NVFP4A16" else 0.0)
    assert {path.rpartition(".")[2] for path in found} >= {"gate_up_E2FD", "down_EDF"}


def nvfp4(tensors: Tensors) -> Any:
    n, half = tensors["weight"].shape
    package = NVFP4QTensor((n, 2 * half), torch.float32, tensors["weight"])
    scales = {"scale": tensors["weight_scale"], "double_scale": tensors["weight_scale_2"]}
    return package.dequantize(dtype=torch.float32, block_sizes={-1: 16}, **scales)


def fp8(tensors: Tensors) -> Any:
    return tensors["weight"].float() * tensors["weight_scale"].float()


def mxfp8(tensors: Tensors) -> Any:
    powers = tensors["weight_scale"].float() - 127
    return tensors["weight"].float() * torch.exp2(powers).repeat_interleave(32, -1)


@pytest.mark.parametrize(
    ("name", "dequantised"),
    [
        ("NVFP4_DEFAULT_CFG", nvfp4), ("W4A16_NVFP4_CFG", nvfp4), ("NVFP4_EXPERTS_ONLY_CFG", nvfp4),
        ("FP8_DEFAULT_CFG", fp8), ("MXFP8_DEFAULT_CFG", mxfp8),
    ],
)  # fmt: skip
def test_what_modelopt_writes(name: str, dequantised: Callable[[Tensors], Any], source: Path, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()

    def calibrate(model: Any) -> None:
        with torch.no_grad():
            model(torch.arange(96)[None])

    export_hf_checkpoint(mtq.quantize(model, getattr(mtq, name), calibrate), export_dir=tmp_path)
    found = assert_same_numbers(tmp_path, lambda module, tensors: dequantised(tensors))
    assert {path.rpartition(".")[2] for path in found} >= {"gate_up_E2FD", "down_EDF"}
