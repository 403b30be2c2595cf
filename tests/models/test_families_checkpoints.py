"""Tests checkpoints in their published form, made from golden ones: gpt-oss in MXFP4, Llama 4 with vision."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.models.stored_forms import decoded

from jmoe import LLM
from jmoe.checkpoint import convert, load_model
from jmoe.checkpoint.identity import model_identity
from jmoe.mesh import make_mesh

GOLDEN = Path(__file__).parents[1] / "golden"
INNER = 32  # the fewest numbers of a row that MXFP4 keeps
Tensors = dict[str, np.ndarray]


def contents(family: str) -> tuple[dict[str, Any], Tensors]:
    config = json.loads((GOLDEN / family / "config.json").read_text())
    return config, load_file(GOLDEN / family / "model.safetensors")


def write(directory: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def logits(directory: Path, tokens, dtype: str = "auto") -> np.ndarray:
    with LLM(directory, dtype=dtype, max_num_seqs=1, max_model_len=64, warm_up=False) as llm:
        return llm.logits(tokens)


def identity(directory: Path) -> str:
    return model_identity(load_model(directory, make_mesh(devices=jax.devices()[:1])))


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory) -> Path:
    """Returns a folder: ``mxfp4`` has random experts, ``plain`` the same numbers unquantised."""
    root, rng = tmp_path_factory.mktemp("gpt_oss"), np.random.default_rng(2)
    config, kept = contents("gpt_oss")
    experts, hidden = config["num_local_experts"], config["hidden_size"]
    kept = {name: tensor for name, tensor in kept.items() if ".experts." not in name}
    four_bits, plain = dict(kept), dict(kept)
    for layer in range(config["num_hidden_layers"]):
        for name, rows in (("gate_up_proj", 2 * INNER), ("down_proj", hidden)):
            name = f"model.layers.{layer}.mlp.experts.{name}"
            blocks = rng.integers(0, 256, (experts, rows, 1, 16), np.uint8)
            scales = rng.integers(120, 125, (experts, rows, 1), np.uint8)
            bias = rng.standard_normal((experts, rows)).astype(np.float32)
            four_bits |= {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": bias}
            values = decoded(blocks, scales).astype(np.float32)
            plain |= {name: np.ascontiguousarray(values.swapaxes(1, 2)), f"{name}_bias": bias}
    config |= {"intermediate_size": INNER}
    write(root / "plain", config, plain)
    write(root / "mxfp4", config | {"quantization_config": {"quant_method": "mxfp4"}}, four_bits)
    return root


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gpt_oss_in_mxfp4_is_what_its_numbers_are(gpt_oss: Path, dtype: str):
    tokens = np.random.default_rng(0).integers(0, 45, 30)
    found, want = logits(gpt_oss / "mxfp4", tokens, dtype), logits(gpt_oss / "plain", tokens, dtype)
    # kernels multiply with the codes and round activations in another way (to int16 on a CPU)
    tolerance = {"float32": 1e-3, "bfloat16": 3e-2}[dtype]
    np.testing.assert_allclose(found, want, atol=tolerance * np.abs(want).max())
    assert np.isfinite(found).all() and found.std() > 0.1


def test_a_conversion_of_mxfp4_is_the_same_model(gpt_oss: Path, tmp_path: Path):
    convert(gpt_oss / "mxfp4", tmp_path / "out")
    tokens = np.random.default_rng(1).integers(0, 45, 30)
    np.testing.assert_array_equal(logits(tmp_path / "out", tokens), logits(gpt_oss / "mxfp4", tokens))
    assert identity(tmp_path / "out") == identity(gpt_oss / "mxfp4") == identity(gpt_oss / "plain")


def test_mxfp4_without_its_scales_is_refused(gpt_oss: Path, tmp_path: Path):
    tensors = load_file(gpt_oss / "mxfp4" / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.down_proj_scales"]
    config = json.loads((gpt_oss / "mxfp4" / "config.json").read_text())
    with pytest.raises(ValueError, match=r"tensor 'model\.layers\.1\..*down_proj_scales' .*is missing"):
        LLM(write(tmp_path / "torn", config, tensors))


def with_vision() -> tuple[dict[str, Any], Tensors]:
    """Returns the golden Llama 4 (config, tensors) as the text model of a model that sees images."""
    text, tensors = contents("llama4")
    config = {
        "architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "text_config": text,
        "vision_config": {"model_type": "llama4_vision_model"}, "torch_dtype": text.pop("dtype"),
    }  # fmt: skip
    tensors = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    for name in ("vision_model.patch_embedding.linear.weight", "multi_modal_projector.linear_1.weight"):
        tensors[name] = np.ones((3, 5), np.float32)
    return config, tensors


def test_llama4_with_vision_gives_its_texts_logits(tmp_path: Path):
    golden = np.load(GOLDEN / "llama4" / "golden.npz")
    directory, tokens = write(tmp_path / "whole", *with_vision()), golden["tokens"][:60]
    found = logits(directory, tokens)
    np.testing.assert_allclose(found, golden["logits"][:60], atol=1e-4)
    convert(directory, tmp_path / "out")
    np.testing.assert_array_equal(logits(tmp_path / "out", tokens), found)
    assert identity(tmp_path / "out") == identity(directory)


def test_llama4_with_a_tensor_of_neither_part_is_refused(tmp_path: Path):
    config, tensors = with_vision()
    tensors["audio_model.weight"] = np.ones(2, np.float32)
    with pytest.raises(
        ValueError, match=r"'audio_model\.weight' is not one of Llama4ForConditionalGeneration"
    ):
        LLM(write(tmp_path / "whole", config, tensors))
