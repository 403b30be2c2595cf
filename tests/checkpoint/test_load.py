"""On any mesh, the decoder computes with the weights that a Hugging Face directory holds."""

import json
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding
from support.models import hf_tiny
from support.models.small import config as small_config

from jmoe.checkpoint import load_model, read_config
from jmoe.checkpoint.checkpoint import aligned_empty
from jmoe.checkpoint.params import ParamSpec, abstract_decoder, dotted, put_on_mesh
from jmoe.config.moe import MoEConfig
from jmoe.mesh import make_mesh, split_attention
from jmoe.models.decoder import Decoder, make_blueprint
from jmoe.nn.kinds import make_state
from jmoe.nn.kv_cache import StateSizes
from jmoe.nn.sequences import Sequences
from jmoe.param import ParamMaker


def one_device():
    return make_mesh(devices=jax.devices()[:1])


def eight_devices():
    return make_mesh(data=2, expert=2, tensor=2, devices=jax.devices()[:8])


def values(model: Decoder) -> dict[str, np.ndarray]:
    """Returns every parameter in the checkpoint's dtype."""
    out = {}
    for keys, param in nnx.to_flat_state(nnx.state(model)):
        value = np.asarray(param.get_value())
        out[dotted(keys)] = value.view(ml_dtypes.bfloat16) if value.dtype == np.uint16 else value
    return out


@nnx.jit
def logits(model: Decoder) -> jax.Array:
    tokens = jnp.arange(24, dtype=jnp.int32).reshape(4, 6)
    positions = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32), (4, 6))
    return model.logits(model(Sequences(tokens, positions)).hidden_RND)


def stacked(tensors: dict[str, np.ndarray], architecture: str, layer: int) -> dict[str, np.ndarray]:
    """Returns a layer's expert stacks, made without the loader."""
    mixtral = architecture == hf_tiny.MIXTRAL
    block = f"model.layers.{layer}." + ("block_sparse_moe" if mixtral else "mlp") + ".experts"
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    get = lambda e, name: tensors[f"{block}.{e}.{name}.weight"]  # noqa: E731
    return {
        "gate_up_E2FD": np.stack([np.stack([get(e, gate), get(e, up)]) for e in range(8)]),
        "down_EDF": np.stack([get(e, down) for e in range(8)]),
    }


def assert_same(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for path, value in want.items():
        assert got[path].dtype == value.dtype, path
        np.testing.assert_array_equal(got[path], value, err_msg=path)


@pytest.mark.parametrize("architecture", hf_tiny.FAMILIES)
def test_logits_equal_those_of_the_same_weights_set_directly(architecture, tmp_path):
    config = hf_tiny.hf_config(architecture)
    tensors = hf_tiny.write_checkpoint(tmp_path, config)
    loaded = load_model(tmp_path, one_device())

    cfg = loaded.cfg
    direct = nnx.eval_shape(
        lambda: Decoder(make_blueprint(cfg, MoEConfig(), one_device()), ParamMaker(jnp.float32, nnx.Rngs(0)))
    )
    direct.embed.set_value(tensors["model.embed_tokens.weight"])
    direct.lm_head.set_value(tensors["lm_head.weight"])
    direct.norm.scale_D.set_value(tensors["model.norm.weight"])
    for i, layer in enumerate(direct.layers):
        theirs = f"model.layers.{i}"
        layer.input_norm.scale_D.set_value(tensors[f"{theirs}.input_layernorm.weight"])
        layer.post_attention_norm.scale_D.set_value(tensors[f"{theirs}.post_attention_layernorm.weight"])
        for name, param in nnx.state(layer.attention, nnx.Param).items():
            assert param.get_value().shape == tensors[f"{theirs}.self_attn.{name}.weight"].shape
            getattr(layer.attention, name).set_value(tensors[f"{theirs}.self_attn.{name}.weight"])
        mixtral = architecture == hf_tiny.MIXTRAL
        layer.moe.router.gate_ED.set_value(
            tensors[f"{theirs}.{'block_sparse_moe' if mixtral else 'mlp'}.gate.weight"]
        )
        for name, stack in stacked(tensors, architecture, i).items():
            getattr(layer.moe.experts, name).set_value(stack)
    assert_same(values(loaded), values(direct))
    np.testing.assert_array_equal(logits(loaded), logits(direct))


@pytest.mark.parametrize("architecture", hf_tiny.FAMILIES)
def test_transformers_4_and_5_spellings_read_alike(architecture, tmp_path):
    for spelling in (4, 5):
        hf_tiny.write_checkpoint(tmp_path / str(spelling), hf_tiny.hf_config(architecture, spelling=spelling))
    assert read_config(tmp_path / "4") == read_config(tmp_path / "5")
    assert read_config(tmp_path / "4").rope.rope_theta == 5000.0
    one = load_model(tmp_path / "4", one_device())
    assert_same(values(load_model(tmp_path / "5", one_device())), values(one))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eight_devices_hold_the_same_weights(dtype, tmp_path):
    hf_tiny.write_checkpoint(tmp_path, hf_tiny.hf_config(dtype=dtype), shards=3)
    single, spread = load_model(tmp_path, one_device()), load_model(tmp_path, eight_devices())
    assert_same(values(spread), values(single))
    down = spread.layers[0].moe.experts.down_EDF[...]
    assert down.committed
    assert len(down.sharding.device_set) == 8
    assert down.addressable_shards[0].data.shape == (4, 32, 8)
    if dtype == "float32":
        np.testing.assert_allclose(logits(spread), logits(single), rtol=1e-5, atol=1e-5)


def test_sharded_files_and_attention_biases(tmp_path):
    config = hf_tiny.hf_config(attention_bias=True)
    tensors = hf_tiny.write_checkpoint(tmp_path / "whole", config)
    hf_tiny.write_checkpoint(tmp_path / "parts", config, shards=4, tensors=tensors)
    whole = values(load_model(tmp_path / "whole", one_device()))
    assert_same(values(load_model(tmp_path / "parts", one_device())), whole)
    np.testing.assert_array_equal(
        whole["layers.1.attention.k_bias"], tensors["model.layers.1.self_attn.k_proj.bias"]
    )


@pytest.mark.parametrize(
    ("stored", "asked", "target"),
    [
        ("float32", "bfloat16", ml_dtypes.bfloat16),
        ("bfloat16", "float32", np.float32),
        ("float16", "float32", np.float32),
        ("float16", "bfloat16", ml_dtypes.bfloat16),
    ],
)
def test_dtypes_are_converted(stored, asked, target, tmp_path):
    tensors = hf_tiny.write_checkpoint(tmp_path, hf_tiny.hf_config(dtype=stored))
    model = load_model(tmp_path, one_device(), dtype=asked)
    assert model.cfg.dtype == asked
    got = values(model)
    np.testing.assert_array_equal(got["embed"], tensors["model.embed_tokens.weight"].astype(target))
    np.testing.assert_array_equal(
        got["layers.1.moe.experts.gate_up_E2FD"],
        stacked(tensors, hf_tiny.QWEN3, 1)["gate_up_E2FD"].astype(target),
    )


def test_float16_is_computed_in_float32_which_holds_it(tmp_path):
    tensors = hf_tiny.write_checkpoint(tmp_path, hf_tiny.hf_config(dtype="float16"))
    model = load_model(tmp_path, one_device())
    assert model.cfg.dtype == "float32"
    np.testing.assert_array_equal(
        values(model)["embed"], tensors["model.embed_tokens.weight"].astype(np.float32)
    )


def test_known_extras_are_left_out(tmp_path):
    config = hf_tiny.hf_config(tie_word_embeddings=True)
    tensors = hf_tiny.random_tensors(config)
    extra = {
        "lm_head.weight": tensors["model.embed_tokens.weight"].copy(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    hf_tiny.write_checkpoint(tmp_path, config, tensors=tensors | extra)
    assert not hasattr(load_model(tmp_path, one_device()), "lm_head")


def test_one_device_aliases_the_buffer():
    device = jax.devices()[0]
    for dtype, storage in ((np.float32, np.float32), (ml_dtypes.bfloat16, np.uint16)):
        buffer = aligned_empty((3, 5), dtype)
        buffer[...] = 1
        spec = ParamSpec("p", (3, 5), np.dtype(dtype), np.dtype(storage), SingleDeviceSharding(device))
        array = put_on_mesh(buffer, spec)
        assert array.dtype == storage
        assert not buffer.flags.writeable
        if device.platform == "cpu":
            assert array.unsafe_buffer_pointer() == buffer.ctypes.data


def test_storage_follows_the_devices_of_the_mesh(monkeypatch):
    """Storage follows the devices of the mesh: here CPU devices on a machine with other default devices."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    cfg = small_config(dtype="bfloat16")
    _, specs = abstract_decoder(make_blueprint(cfg, MoEConfig(), one_device()))
    assert specs["layers.0.moe.experts.down_EDF"].storage == np.uint16
    assert (
        make_state(cfg, split_attention(one_device(), "dp"), "cpu", StateSizes(2, 8, 1))[0].kv[0].dtype
        == np.uint16
    )


def test_host_memory_is_the_model_and_little_more(tmp_path):
    sizes = {"vocab_size": 4096, "hidden_size": 128, "moe_intermediate_size": 256}
    tensors = hf_tiny.write_checkpoint(tmp_path, hf_tiny.hf_config(dtype="bfloat16", **sizes))
    total = sum(t.nbytes for t in tensors.values())
    del tensors
    tracemalloc.start()  # numpy reports its buffers to it
    model = load_model(tmp_path, one_device())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert model.embed[...].shape == (4096, 128)
    assert peak < total + (3 << 20)


def test_progress_counts_every_byte(tmp_path):
    hf_tiny.write_checkpoint(tmp_path, hf_tiny.hf_config())
    seen = []
    model = load_model(tmp_path, one_device(), progress=lambda done, total: seen.append((done, total)))
    sizes = sum(v.nbytes for v in values(model).values())
    assert seen == sorted(seen)
    assert seen[-1] == (sizes, sizes)


def _without(name):
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without("model.norm.weight"), r"'model\.norm\.weight' of Qwen3Moe\w+ is missing"),
        (_without("model.layers.1.mlp.experts.7.up_proj.weight"), r"experts\.7\.up_proj\.weight' .* missing"),
        (lambda t: t.update({"model.extra": np.ones(2, np.float32)}), r"'model\.extra' is not one of"),
        (
            lambda t: t.update({"model.norm.weight": np.ones(31, np.float32)}),
            r"must be \[32\] .* it is \[31\]",
        ),
        (lambda t: t.update({"model.norm.weight": np.ones(32, np.int32)}), r"norm\.weight' has dtype I32"),
        (lambda t: t["model.norm.weight"].fill(np.nan), r"'model\.norm\.weight' has NaN or Inf"),
        (lambda t: t["lm_head.weight"].__setitem__((95, 31), -np.inf), r"'lm_head\.weight' has NaN or Inf"),
    ],
)
def test_wrong_tensors_are_refused_by_name(damage, message, tmp_path):
    config = hf_tiny.hf_config()
    tensors = hf_tiny.random_tensors(config)
    damage(tensors)
    hf_tiny.write_checkpoint(tmp_path, config, tensors=tensors)
    with pytest.raises(ValueError, match=message) as error:
        load_model(tmp_path, one_device())
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_value_beyond_the_asked_dtype_is_refused(tmp_path):
    config = hf_tiny.hf_config()
    tensors = hf_tiny.random_tensors(config)
    tensors["model.norm.weight"][3] = np.finfo(np.float32).max  # it rounds up to Inf in bfloat16
    hf_tiny.write_checkpoint(tmp_path, config, tensors=tensors)
    load_model(tmp_path, one_device())
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' has NaN or Inf \(as bfloat16\)"):
        load_model(tmp_path, one_device(), dtype="bfloat16")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("", "damaged JSON"),
        ('{"architectures": [', "damaged JSON"),
        ("[]", "must be a JSON object"),
        ("[" * 100_000, "damaged JSON"),
        ('{"vocab_size": 1, "vocab_size": 2}', "'vocab_size' is given twice"),
        ({"architectures": ["LlamaForCausalLM"]}, "'LlamaForCausalLM' is not supported; supported: Mixtral"),
        ({"architectures": None}, "must name one architecture"),
        ({"vocab_size": None}, "no 'vocab_size'"),
        ({"vocab_size": "96"}, "vocab_size must be a positive integer, got '96'"),
        ({"vocab_size": 10**12}, "vocab_size 1000000000000 exceeds"),
        ({"num_attention_heads": 0, "head_dim": None}, "config.json: "),
        ({"rope_parameters": "yarn"}, "config.json: "),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope type 'dynamic' is not supported"),
        (
            {"rope_parameters": {"rope_type": "yarn"}},
            "rope type 'yarn' needs original_max_position_embeddings",
        ),
        (
            {"quantization_config": {"quant_method": "hqq"}},
            "quantization_config: method 'hqq' is not read; .*'mxfp4'",
        ),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000 exceeds 10000"),
        ({"num_hidden_layers": 10**3}, r"'model\.layers\.2\.input_layernorm\.weight' .* is missing"),
        ({"num_hidden_layers": 1}, r"'model\.layers\.1\..*' is not one of"),
    ],
)
def test_wrong_configs_are_refused_in_one_line(text, message, tmp_path):
    config = hf_tiny.hf_config()
    hf_tiny.write_checkpoint(tmp_path, config)
    path = tmp_path / "config.json"
    if text is None:
        path.unlink()
    else:
        path.write_text(text if isinstance(text, str) else json.dumps(config | text))
    with pytest.raises(ValueError, match=message) as error:
        load_model(tmp_path, one_device())
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("load", [read_config, lambda path: load_model(path, one_device())])
def test_a_name_of_the_hub_is_not_fetched_here(load, tmp_path):
    with pytest.raises(ValueError, match=r"'some/model' is not a directory"):
        load("some/model")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="is a file; give its directory"):
        load(tmp_path / "model.safetensors")
