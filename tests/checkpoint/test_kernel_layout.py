"""Tests that quantised weights are in memory as the kernels read them, and mean the same on every mesh."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from jmoe_kernels import cpu
from jmoe_kernels.grouped_mlp import IMPLEMENTATIONS
from jmoe_kernels.quantised import Quantised, dequantised
from support.models import hf_tiny

from jmoe.checkpoint import convert, load_model
from jmoe.checkpoint.params import dotted
from jmoe.checkpoint.quantised.codings import Quantize
from jmoe.config.moe import MoEConfig
from jmoe.config.techniques import OffloadConfig
from jmoe.mesh import make_mesh
from jmoe.models.decoder import Decoder
from jmoe.nn.sequences import Sequences

pytestmark = pytest.mark.skipif(cpu.why_missing() is not None, reason="no C++ kernels here")
SIZES = {"hidden_size": 64, "moe_intermediate_size": 64, "tie_word_embeddings": True}
PORTABLE = MoEConfig(kernel="xla")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    hf_tiny.write_checkpoint(directory, hf_tiny.hf_config(**SIZES))
    return directory


def quantised(model: Decoder) -> dict[str, Quantised]:
    values = {dotted(k): p.get_value() for k, p in nnx.to_flat_state(nnx.state(model))}
    return {path: value for path, value in values.items() if isinstance(value, Quantised)}


@pytest.mark.parametrize("method", ["int8", "int4", "fp8", "mxfp4"])
def test_loaded_weights_are_packed_and_have_the_same_numbers(method, model: Path, tmp_path: Path):
    mesh, request = make_mesh(devices=jax.devices()[:1]), Quantize(method)
    convert(model, tmp_path / "converted", quantize=request)
    portable = quantised(load_model(model, mesh, PORTABLE, quantize=request))
    assert {weight.layout for weight in portable.values()} == {"rows"}
    for packed in (load_model(model, mesh, quantize=request), load_model(tmp_path / "converted", mesh)):
        weights = quantised(packed)
        assert weights.keys() == portable.keys()
        assert {weight.layout for weight in weights.values()} == {"n16"}
        for path, weight in weights.items():
            want = dequantised(jax.tree.map(np.asarray, portable[path]))
            np.testing.assert_array_equal(dequantised(jax.tree.map(np.asarray, weight)), want, err_msg=path)


@nnx.jit
def logits_of(model: Decoder, ids_BT: jax.Array) -> jax.Array:
    positions = jax.numpy.broadcast_to(jax.numpy.arange(ids_BT.shape[1]), ids_BT.shape)
    return model.logits(model(Sequences(ids_BT, positions)).hidden_RND)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2)])
def test_packed_weights_compute_what_portable_ones_do_on_a_mesh(sizes, model: Path):
    mesh, ids = make_mesh(*sizes), jax.numpy.arange(32).reshape(4, 8)
    want = logits_of(load_model(model, mesh, PORTABLE, quantize=Quantize("int4")), ids)
    packed = load_model(model, mesh, quantize=Quantize("int4"))
    experts = [weight for path, weight in quantised(packed).items() if "experts" in path]
    assert experts and {weight.layout for weight in experts} == {"n16"}
    np.testing.assert_allclose(logits_of(packed, ids), want, atol=2e-3 * np.abs(want).max())


def test_stacks_of_offloaded_experts_are_packed(model: Path):
    offload = MoEConfig(offload=OffloadConfig(slots_per_layer=4))
    weights = quantised(load_model(model, make_mesh(), offload, quantize=Quantize("int4")))
    plain = quantised(load_model(model, make_mesh(), PORTABLE, quantize=Quantize("int4")))
    stack = weights["store.down_LEDF"]
    assert stack.layout == "n16"
    for layer in range(stack.shape[0]):
        want = dequantised(plain[f"layers.{layer}.moe.experts.down_EDF"])
        np.testing.assert_array_equal(dequantised(stack)[layer], want)


@pytest.fixture
def columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes portable XLA want its experts in the layout of the TPU kernels."""
    wanting = replace(IMPLEMENTATIONS["xla"], layout_of=lambda coding: "columns")
    monkeypatch.setitem(IMPLEMENTATIONS, "xla", wanting)


@pytest.mark.parametrize("method", ["int8", "int4", "fp8", "mxfp4"])
@pytest.mark.parametrize("sizes", [pytest.param((1, 1, 1), marks=pytest.mark.matrix), (2, 2, 2)])
def test_experts_in_columns_compute_what_rows_do(method, sizes, model: Path, tmp_path: Path, request):
    mesh, ids, how = make_mesh(*sizes), jax.numpy.arange(32).reshape(4, 8), Quantize(method)
    want = logits_of(load_model(model, mesh, PORTABLE, quantize=how), ids)
    convert(model, tmp_path / "converted", quantize=how)
    request.getfixturevalue("columns")
    for turned in (
        load_model(model, mesh, PORTABLE, quantize=how),
        load_model(tmp_path / "converted", mesh, PORTABLE),
    ):
        layouts = {path: weight.layout for path, weight in quantised(turned).items()}
        assert all((layout == "columns") == ("experts" in path) for path, layout in layouts.items())
        np.testing.assert_allclose(logits_of(turned, ids), want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("method", ["int4", "mxfp4"])
def test_stacks_of_offloaded_experts_in_columns(method, model: Path, columns):
    offload = MoEConfig(offload=OffloadConfig(slots_per_layer=4), kernel="xla")
    stack = quantised(load_model(model, make_mesh(), offload, quantize=Quantize(method)))["store.down_LEDF"]
    plain = quantised(load_model(model, make_mesh(), PORTABLE, quantize=Quantize(method)))
    assert stack.layout == "columns"
    for layer in range(stack.shape[0]):
        want = dequantised(plain[f"layers.{layer}.moe.experts.down_EDF"])
        np.testing.assert_array_equal(dequantised(stack)[layer], want)


@pytest.mark.parametrize("method", ["int8", "int4", "fp8", "mxfp4"])
@pytest.mark.parametrize("sizes", [pytest.param((1, 1, 1), marks=pytest.mark.matrix), (1, 2, 1)])
def test_experts_in_tiles_compute_what_rows_do(method, sizes, model: Path, monkeypatch: pytest.MonkeyPatch):
    mesh, ids, how = make_mesh(*sizes), jax.numpy.arange(32).reshape(4, 8), Quantize(method)
    want = logits_of(load_model(model, mesh, PORTABLE, quantize=how), ids)
    wanting = replace(IMPLEMENTATIONS["xla"], layout_of=IMPLEMENTATIONS["pallas_gpu"].layout_of)
    monkeypatch.setitem(IMPLEMENTATIONS, "xla", wanting)
    tiled = load_model(model, mesh, PORTABLE, quantize=how)
    layouts = {path: weight.layout for path, weight in quantised(tiled).items()}
    assert all((layout == "tiles") == ("experts" in path) for path, layout in layouts.items())
    np.testing.assert_allclose(logits_of(tiled, ids), want, atol=2e-5 * np.abs(want).max())
