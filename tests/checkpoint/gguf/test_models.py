"""A GGUF file of every architecture is the model that it was made from."""

import json
from collections.abc import Callable
from io import FileIO
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.models import hf_tiny
from support.models.gguf_models import ARCHITECTURES, gguf, merged, tensors, write_gguf

from jmoe import LLM
from jmoe.checkpoint import convert, load_model, read_config
from jmoe.checkpoint.gguf.blocks import FORMATS
from jmoe.checkpoint.gguf.file import GgufHeader, read_header
from jmoe.checkpoint.params import abstract_decoder
from jmoe.checkpoint.quantised.codings import read_codings
from jmoe.checkpoint.source import source_of
from jmoe.config.moe import MoEConfig
from jmoe.mesh import make_mesh
from jmoe.models import get_family, model_config
from jmoe.models.decoder import make_blueprint

GOLDEN = Path(__file__).parents[2] / "golden"
FAMILIES = sorted(d.name for d in GOLDEN.iterdir() if d.name not in ("llama4", "phimoe"))
TOKENS = np.arange(20) % 40
# What a family's golden configuration has and no GGUF file says: it is changed in both models.
SAID_OTHERWISE = {"deepseek_v2": {"mscale": 0.6}}


def logits(model: Path, dtype: str = "float32") -> np.ndarray:
    """Returns logits that the portable kernels compute, which round no activations."""
    portable = MoEConfig(kernel="xla")
    llm = LLM(model, moe=portable, dtype=dtype, max_num_seqs=1, max_num_batched_tokens=64, warm_up=False)
    return llm.logits(TOKENS)


def golden(family: str, to: Path) -> Path:
    config = json.loads((GOLDEN / family / "config.json").read_text())
    config["rope_parameters"] |= SAID_OTHERWISE.get(family, {})
    hf_tiny.write_checkpoint(to, config, tensors=load_file(GOLDEN / family / "model.safetensors"))
    return to


@pytest.mark.parametrize("family", FAMILIES)
def test_a_float_file_has_the_logits_of_its_source(family: str, tmp_path: Path):
    directory = golden(family, tmp_path / "hf")
    write_gguf(directory, tmp_path / "model.gguf")
    np.testing.assert_allclose(logits(tmp_path / "model.gguf"), logits(directory), atol=1e-5, rtol=1e-5)
    mine, source = (read_config(path, "float32") for path in (tmp_path / "model.gguf", directory))
    assert mine.router == source.router and mine.layer_types == source.layer_types


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_latent_attention_is_read_by_head_too(family: str, tmp_path: Path):
    directory = golden(family, tmp_path / "hf")
    write_gguf(directory, tmp_path / "model.gguf", by_head=True)
    np.testing.assert_allclose(logits(tmp_path / "model.gguf"), logits(directory), atol=1e-5, rtol=1e-5)


def test_keys_by_head_are_dequantised(tmp_path: Path):
    """Blocks lie along the other axis than the parameter's rows, so it cannot keep them."""
    config = json.loads((GOLDEN / "deepseek_v3" / "config.json").read_text())
    config |= {"qk_nope_head_dim": 32, "v_head_dim": 32, "kv_lora_rank": 64, "num_attention_heads": 2}
    config |= {"num_key_value_heads": 2, "attention_bias": False}
    cfg = model_config(config)
    _, specs = abstract_decoder(make_blueprint(cfg, MoEConfig(), make_mesh(devices=jax.devices()[:1])))
    rng, source = np.random.default_rng(0), {}
    for stored in get_family(cfg.architecture).names(cfg):
        shape = specs[stored.path].shape[len(stored.index) :]
        source[stored.name] = rng.standard_normal(shape).astype(np.float32) / 4
    hf_tiny.write_checkpoint(tmp_path / "hf", config, tensors=source)

    def types(name: str, numbers: np.ndarray) -> str:
        return "Q8_0" if name.endswith(("attn_k_b.weight", "attn_v_b.weight")) else "F32"

    path = tmp_path / "model.gguf"
    written = write_gguf(tmp_path / "hf", path, types, by_head=True)
    for i in range(cfg.num_hidden_layers):
        keys, values = (
            gguf.dequantize(written[f"blk.{i}.attn_{each}_b.weight"], gguf.GGMLQuantizationType.Q8_0)
            for each in "kv"
        )
        both = np.concatenate([keys.reshape(2, 64, 32).swapaxes(1, 2), values.reshape(2, 32, 64)], axis=1)
        source[f"model.layers.{i}.self_attn.kv_b_proj.weight"] = both.reshape(128, 64)
    hf_tiny.write_checkpoint(tmp_path / "plain", config, tensors=source)
    np.testing.assert_allclose(logits(path), logits(tmp_path / "plain"), atol=1e-5, rtol=1e-5)
    assert not read_codings(path, read_config(path))


SIZES = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
SIZED = {
    "QWEN3": (hf_tiny.QWEN3, {"moe_intermediate_size": 256, "head_dim": 64}),
    "OLMOE": (hf_tiny.OLMOE, {"intermediate_size": 256}),
    "MIXTRAL": (hf_tiny.MIXTRAL, {"intermediate_size": 256, "sliding_window": None}),
}


def mixed(kind: str) -> Callable[[str, np.ndarray], str]:
    """Returns the types of a file as llama.cpp mixes them: other ones for values, down and the head."""

    def types(name: str, numbers: np.ndarray) -> str:
        if numbers.ndim == 1 or "gate_inp" in name:
            return "F32"
        return "Q6_K" if name.endswith(("attn_v.weight", "output.weight")) or "token_embd" in name else kind

    return types


def plain_copy(directory: Path, written: dict[str, np.ndarray], types: Callable, to: Path) -> Path:
    """Writes a Hugging Face directory with the numbers of the blocks, in float32."""
    config = json.loads((directory / "config.json").read_text())
    source = load_file(directory / "model.safetensors")
    in_file = [name for name, _ in tensors(config, source)]
    names = dict(zip(in_file, merged(config["architectures"][0], source), strict=True))
    numbers = {}
    for name, (hf_name, own) in names.items():
        if name in written:
            kind = types(name, own)
            own = gguf.dequantize(written[name], gguf.GGMLQuantizationType[kind]).reshape(own.shape)
            for heads, letter in ((4, "q"), (2, "k")):
                if config["architectures"][0] == hf_tiny.MIXTRAL and f".{letter}_proj." in hf_name:
                    own = own.reshape(heads, -1, 2, own.shape[1]).swapaxes(1, 2).reshape(own.shape)
        experts = ".experts." in hf_name
        for e in range(len(own) if experts else 1):
            part = hf_name.replace(".experts.", f".experts.{e}.") if experts else hf_name
            numbers[part] = np.ascontiguousarray(own[e] if experts else own)
    to.mkdir()
    (to / "config.json").write_text(json.dumps(config))
    save_file(numbers, to / "model.safetensors")
    return to


@pytest.mark.parametrize("name", SIZED)
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_a_quantised_file_has_the_logits_of_the_plain_copy(name: str, kind: str, tmp_path: Path):
    check_quantised(name, kind, tmp_path)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind not in ("Q8_0", "Q4_K")])
def test_every_type_has_the_logits_of_the_plain_copy(kind: str, tmp_path: Path):
    check_quantised("QWEN3", kind, tmp_path)


def check_quantised(name: str, kind: str, tmp_path: Path) -> None:
    architecture, changes = SIZED[name]
    config = hf_tiny.hf_config(architecture, **SIZES | {"num_key_value_heads": 2} | changes)
    hf_tiny.write_checkpoint(tmp_path / "hf", config)
    path, types = tmp_path / "model.gguf", mixed(kind)
    written = write_gguf(tmp_path / "hf", path, types)
    want = logits(plain_copy(tmp_path / "hf", written, types, tmp_path / "plain"))
    np.testing.assert_allclose(logits(path), want, atol=2e-4 * np.abs(want).max())

    cfg = read_config(path)
    assert cfg.dtype == "bfloat16"
    codings = read_codings(path, cfg)
    assert codings["layers.0.moe.experts.gate_up_E2FD"] == FORMATS[kind].coding
    assert codings["layers.1.attention.v_proj"] == FORMATS["Q6_K"].coding
    assert "embed" not in codings and "lm_head" in codings

    convert(path, tmp_path / "orbax", "float32")
    np.testing.assert_allclose(logits(tmp_path / "orbax"), want, atol=2e-4 * np.abs(want).max())


def test_gpt_oss_keeps_its_blocks(tmp_path: Path):
    """MXFP4 experts stay packed, and their numbers are those of the package."""
    config = json.loads((GOLDEN / "gpt_oss" / "config.json").read_text()) | {"intermediate_size": 32}
    rng = np.random.default_rng(0)
    source = load_file(GOLDEN / "gpt_oss" / "model.safetensors")
    for name, numbers in source.items():
        if ".experts." in name:
            shape = [{8: 32, 16: 64}.get(n, n) if axis else n for axis, n in enumerate(numbers.shape)]
            source[name] = rng.standard_normal(shape).astype(np.float32) / 8
    hf_tiny.write_checkpoint(tmp_path / "hf", config, tensors=source)

    def types(name: str, numbers: np.ndarray) -> str:
        return "MXFP4" if name.endswith("_exps.weight") else "F32"

    path = tmp_path / "model.gguf"
    written = write_gguf(tmp_path / "hf", path, types)
    exact = {name: gguf.dequantize(raw, gguf.GGMLQuantizationType.MXFP4) for name, raw in written.items()}
    for name in [name for name in source if name.endswith("experts.down_proj")]:
        layer = name.split(".")[2]
        source[name] = np.ascontiguousarray(exact[f"blk.{layer}.ffn_down_exps.weight"].swapaxes(1, 2))
        both = [exact[f"blk.{layer}.ffn_{half}_exps.weight"].swapaxes(1, 2) for half in ("gate", "up")]
        gate_up = np.stack(both, axis=-1).reshape(*both[0].shape[:-1], -1)
        source[name.replace("down", "gate_up")] = np.ascontiguousarray(gate_up)
    hf_tiny.write_checkpoint(tmp_path / "plain", config, tensors=source)
    want = logits(tmp_path / "plain")
    np.testing.assert_allclose(logits(path), want, atol=2e-4 * np.abs(want).max())
    assert read_codings(path, read_config(path))["layers.0.moe.experts.down_EDF"].code == "e2m1"


def test_every_architecture_that_is_read_has_a_model_here():
    from jmoe.checkpoint.gguf.config import ARCHITECTURES as READ

    assert {*READ} == {*ARCHITECTURES.values()}


def test_a_split_model_is_read_from_its_first_part_or_its_directory(tmp_path: Path):
    directory = golden("qwen3_moe", tmp_path / "hf")
    folder = tmp_path / "split"
    folder.mkdir()
    write_gguf(directory, folder / "m.gguf", split=9)
    parts = sorted(folder.iterdir())
    assert len(parts) > 2
    want = logits(directory)
    np.testing.assert_allclose(logits(parts[0]), want, atol=1e-5)
    np.testing.assert_allclose(logits(folder), want, atol=1e-5)
    with pytest.raises(ValueError, match=r"is part 2 of \d; give the first"):
        read_config(parts[1])
    parts[-1].unlink()
    with pytest.raises(ValueError, match="is missing"):
        read_config(parts[0])


def test_a_load_parses_every_header_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Configuration, codings, weights and tokenizer come from one parse of each file."""
    directory, folder, parsed = golden("qwen3_moe", tmp_path / "hf"), tmp_path / "split", []
    folder.mkdir()
    write_gguf(directory, folder / "m.gguf", split=9)

    def counted(file: FileIO) -> GgufHeader:
        parsed.append(Path(str(file.name)).name)
        return read_header(file)

    monkeypatch.setattr("jmoe.checkpoint.gguf.file.read_header", counted)
    logits(folder)
    parts = sorted(path.name for path in folder.iterdir())
    assert sorted(parsed) == parts
    parsed.clear()
    convert(folder, tmp_path / "orbax")
    assert sorted(parsed) == parts
    load_model(folder, make_mesh(devices=jax.devices()[:1]))
    assert sorted(parsed) == sorted([*parts, *parts])


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path):
    write_gguf(golden("qwen3_moe", tmp_path / "hf"), tmp_path / "m.gguf")
    source = source_of(tmp_path / "m.gguf")
    read_config(source)
    with open(tmp_path / "m.gguf", "ab") as file:
        file.write(bytes(8))
    with pytest.raises(ValueError, match=r"m\.gguf: was changed while the model was read"):
        source.open()


def test_a_wrong_shape_is_refused_by_the_metadata(tmp_path: Path):
    directory = golden("qwen3_moe", tmp_path / "hf")
    config = json.loads((directory / "config.json").read_text())
    config["moe_intermediate_size"] += 8
    (directory / "config.json").write_text(json.dumps(config))
    write_gguf(directory, tmp_path / "m.gguf")
    with pytest.raises(ValueError, match=r"_exps.weight' must be \[.*\] by the metadata of m.gguf, it is \["):
        load_model(tmp_path / "m.gguf", make_mesh(devices=jax.devices()[:1]))


def test_a_directory_with_several_models_is_refused(tmp_path: Path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"has 2 GGUF models \(a.gguf, b.gguf .*give one"):
        read_config(tmp_path)
    (tmp_path / "b.gguf").rename(tmp_path / "mmproj-b.gguf")
    assert source_of(tmp_path).path == tmp_path / "a.gguf"
