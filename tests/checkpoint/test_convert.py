"""Converted checkpoints and exports give back the same weights, and nothing half-written is ever left."""

import json
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from support.models import hf_tiny

from jmoe.checkpoint import convert, load_model, read_config, save_hf
from jmoe.checkpoint.converted.manifest import MANIFEST
from jmoe.checkpoint.safetensors_file import ALIGN
from jmoe.mesh import make_mesh


def one_device():
    return make_mesh(devices=jax.devices()[:1])


def assert_same(a, b):
    pairs = zip(nnx.to_flat_state(nnx.state(a)), nnx.to_flat_state(nnx.state(b)), strict=True)
    for (path, x), (other, y) in pairs:
        assert path == other
        assert x.get_value().dtype == y.get_value().dtype
        np.testing.assert_array_equal(np.asarray(x.get_value()), np.asarray(y.get_value()), err_msg=str(path))


BESIDE = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
          "chat_template.jinja", "chat_template.json",
          "additional_chat_templates/tool_use.jinja")  # fmt: skip


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    root = tmp_path_factory.mktemp("converted")
    hf_tiny.write_checkpoint(root / "hf", hf_tiny.hf_config(dtype="bfloat16"), shards=2)
    (root / "hf" / "additional_chat_templates").mkdir()
    for name in BESIDE:
        (root / "hf" / name).write_text("{}")
    (root / "hf" / "pickle.bin").write_bytes(b"not copied")
    convert(root / "hf", root / "out")
    return root


def test_round_trip_on_one_device_and_on_eight(converted):
    plain = load_model(converted / "hf", one_device())
    seen = []
    again = load_model(converted / "out", one_device(), progress=lambda *done: seen.append(done))
    assert_same(again, plain)
    assert again.embed[...].sharding == plain.embed[...].sharding
    assert seen[-1][0] == seen[-1][1] == sum(x.nbytes for x in jax.tree.leaves(nnx.state(plain)))
    mesh = make_mesh(data=2, expert=2, tensor=2, devices=jax.devices()[:8])
    spread = load_model(converted / "out", mesh)
    assert_same(spread, plain)
    assert spread.layers[0].moe.experts.down_EDF[...].addressable_shards[0].data.shape == (4, 32, 8)


def test_another_dtype_on_the_way_in_and_out(converted):
    convert(converted / "hf", converted / "wide", dtype="float32")
    wide = load_model(converted / "wide", one_device())
    assert wide.cfg.dtype == "float32"
    assert_same(wide, load_model(converted / "hf", one_device(), dtype="float32"))
    narrow = load_model(converted / "wide", one_device(), dtype="bfloat16")
    assert_same(narrow, load_model(converted / "hf", one_device()))


def test_what_lies_next_to_the_weights(converted):
    out = converted / "out"
    names = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert {n for n in names if not n.startswith("params/")} == {"config.json", *BESIDE, MANIFEST}
    assert read_config(converted / "out") == read_config(converted / "hf")
    manifest = json.loads((converted / "out" / MANIFEST).read_text())
    assert manifest["version"] == 3
    assert manifest["dtype"] == "bfloat16"
    assert {p.name for p in (converted / "out" / "params").iterdir()} == {"top", "layers.0", "layers.1"}


def test_existing_and_impossible_targets_are_refused(converted, tmp_path):
    with pytest.raises(ValueError, match="already exists"):
        convert(converted / "hf", converted / "out")
    with pytest.raises(ValueError, match="already converted"):
        convert(converted / "out", tmp_path / "new")
    with pytest.raises(ValueError, match="that is to hold it does not exist"):
        convert(converted / "hf", tmp_path / "no" / "new")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="already exists"):
        convert(converted / "hf", tmp_path / "link")


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, ValueError])
def test_a_failed_convert_leaves_nothing(interrupt, tmp_path):
    config = hf_tiny.hf_config()
    tensors = hf_tiny.random_tensors(config)
    if interrupt is ValueError:
        tensors["model.layers.1.mlp.gate.weight"][0, 0] = np.nan  # found after the first layer was written
    hf_tiny.write_checkpoint(tmp_path / "hf", config, tensors=tensors)

    def progress(done, total):
        if interrupt is KeyboardInterrupt:
            raise KeyboardInterrupt

    with pytest.raises(interrupt):
        convert(tmp_path / "hf", tmp_path / "out", progress=progress)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def _edit(change):
    def damage(out):
        manifest = json.loads((out / MANIFEST).read_text())
        change(manifest)
        (out / MANIFEST).write_text(json.dumps(manifest))

    return damage


def _flip(out):
    path = max((out / "params").rglob("*"), key=lambda p: p.is_file() * p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: (out / "tokenizer.json").unlink(), r"tokenizer\.json: is missing"),
        (lambda out: (out / "tokenizer.json").write_text("{ }"), r"tokenizer\.json: has 3 bytes"),
        (_flip, r"was changed since it was written \(sha256 differs\)"),
        (lambda out: (out / "params" / "top" / "more").write_text(""), "more: is not listed"),
        (lambda out: (out / MANIFEST).write_text("{"), "damaged JSON"),
        (lambda out: (out / MANIFEST).write_text("{}"), "is not the manifest"),
        (_edit(lambda m: m.update(version=1)), "has version 1; this release reads 3"),
        (_edit(lambda m: m.pop("files")), "is damaged: KeyError: 'files'"),
        (_edit(lambda m: m["files"].update({"../x": [1, ""]})), "lies outside the checkpoint"),
        (_edit(lambda m: m["parameters"].pop("norm.scale_D")), "parameter 'norm.scale_D' is missing"),
        (_edit(lambda m: m["parameters"].update(more=[1])), "parameter 'more' is not one of"),
        (
            _edit(lambda m: m["parameters"].update({"norm.scale_D": [31]})),
            r"'norm\.scale_D' must be \[32\] by config.json, it is \[31\]",
        ),
    ],
)
def test_a_changed_checkpoint_is_refused(damage, message, converted, tmp_path):
    out = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(converted / "out"), str(out)], check=True)
    damage(out)
    with pytest.raises(ValueError, match=message) as error:
        load_model(out, one_device())
    assert str(out) in str(error.value)
    assert "\n" not in str(error.value)


def test_importing_the_package_does_not_import_orbax():
    code = "import sys, jmoe.checkpoint; sys.exit(any('orbax' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("architecture", hf_tiny.FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_round_trip(architecture, dtype, tmp_path):
    config = hf_tiny.hf_config(architecture, dtype=dtype)
    tensors = hf_tiny.write_checkpoint(tmp_path / "in", config)
    model = load_model(tmp_path / "in", one_device())
    save_hf(model, config, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    assert_same(load_model(tmp_path / "out", one_device()), model)
    head = (tmp_path / "out" / "model.safetensors").read_bytes()[:8]
    assert (8 + int.from_bytes(head, "little")) % ALIGN == 0
    assert tensors.keys() == set(_public_names(tmp_path / "out"))


def _public_names(directory):
    from safetensors import safe_open

    with safe_open(directory / "model.safetensors", "numpy") as file:
        return file.keys()


def test_export_from_a_mesh_in_another_dtype(tmp_path):
    config = hf_tiny.hf_config(dtype="float32")
    tensors = hf_tiny.write_checkpoint(tmp_path / "in", config)
    mesh = make_mesh(expert=4, tensor=2, devices=jax.devices()[:8])
    save_hf(load_model(tmp_path / "in", mesh), config | {"dtype": "bfloat16"}, tmp_path / "out")
    out = load_model(tmp_path / "out", one_device())
    want = tensors["model.embed_tokens.weight"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(out.embed[...]).view(ml_dtypes.bfloat16), want)


def test_export_refuses_another_models_config_and_nan(tmp_path):
    config = hf_tiny.hf_config()
    hf_tiny.write_checkpoint(tmp_path / "in", config)
    model = load_model(tmp_path / "in", one_device())
    with pytest.raises(ValueError, match="num_experts_per_tok = 3, the model has 2"):
        save_hf(model, config | {"num_experts_per_tok": 3}, tmp_path / "out")
    model.norm.scale_D[...] = model.norm.scale_D[...] * np.float32(np.nan)
    with pytest.raises(ValueError, match=r"parameter 'norm\.scale_D' has NaN or Inf"):
        save_hf(model, config, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
