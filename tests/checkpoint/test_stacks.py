"""Tests that models whose checkpoints stack, turn or quantise experts, or mix dtypes, load and convert."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding
from support.models import hf_tiny
from support.models import stored_forms as forms
from support.models.quantised import plain_values, quantised_paths

from jmoe.checkpoint import convert, load_model, read_config, save_hf
from jmoe.checkpoint.experts.renumber import into_slots, permute_gate, permuted
from jmoe.checkpoint.experts.stacks import Stacks, into_stacks
from jmoe.checkpoint.hf.reader import HFCheckpoint
from jmoe.checkpoint.identity import model_identity
from jmoe.checkpoint.params import ParamSpec, dotted
from jmoe.config.moe import MoEConfig
from jmoe.config.techniques import OffloadConfig
from jmoe.mesh import make_mesh
from jmoe.models import FAMILIES
from jmoe.models.decoder import Decoder
from jmoe.models.weights import StoredTensor
from jmoe.param import ParamMaker
from jmoe.placement.placement import Placement

GOLDEN = Path(__file__).parents[1] / "golden"
DENSE_BETWEEN = (1, 3)  # the layers with experts, of four layers
ROUTERS = ("router.gate_ED", "router.bias_E", "router.correction_E", "router.expert_E")
EXPERTS = ("gate_up_E2FD", "down_EDF", "gate_up_bias_E2F", "down_bias_ED")


def one_device():
    return make_mesh(devices=jax.devices()[:1])


def values(model: Decoder) -> dict[str, np.ndarray]:
    return {dotted(k): np.asarray(p.get_value()) for k, p in nnx.to_flat_state(nnx.state(model))}


def assert_same(got: Decoder, want: Decoder) -> None:
    a, b = values(got), values(want)
    assert a.keys() == b.keys()
    for path in b:
        assert a[path].dtype == b[path].dtype, path
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def assert_same_numbers(got: Decoder, want: Decoder) -> None:
    a, b = plain_values(got), plain_values(want)
    assert a.keys() == b.keys() and quantised_paths(got)
    for path in b:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


@pytest.mark.parametrize("layout", forms.LAYOUTS)
def test_a_stacked_checkpoint_is_the_model_of_its_values(layout: str, tmp_path: Path, monkeypatch):
    dtype = "bfloat16" if layout in ("gpt-oss", "mxfp4") else "float32"
    forms.write_both(tmp_path, layout, dtype)
    plain = load_model(tmp_path / "plain", one_device())
    rows = np.random.default_rng(0).permuted(np.tile(np.arange(8), (2, 1)), axis=1)
    placement = Placement(rows, 2, model_identity(plain))
    offload = MoEConfig(offload=OffloadConfig(slots_per_layer=4))
    ways = ({}, {"placement": placement}, {"moe": offload}, {"moe": offload, "placement": placement})
    want = [load_model(tmp_path / "plain", one_device(), **way) for way in ways]
    monkeypatch.setitem(FAMILIES, hf_tiny.QWEN3, forms.stacking(layout))
    same = assert_same_numbers if layout == "mxfp4" else assert_same
    for way, model in zip(ways, want, strict=True):
        same(load_model(tmp_path / "stacked", one_device(), **way), model)
    convert(tmp_path / "stacked", tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    for way, model in zip(ways[1:3], want[1:3], strict=True):
        same(load_model(tmp_path / "out", one_device(), **way), model)


def test_what_is_stacked_is_not_written(tmp_path: Path, monkeypatch):
    config, _ = forms.write_both(tmp_path, "granite")
    monkeypatch.setitem(FAMILIES, hf_tiny.QWEN3, forms.stacking("granite"))
    model = load_model(tmp_path / "stacked", one_device())
    with pytest.raises(
        ValueError, match=r"'model\.layers\.0\.mlp\.experts\.gate_up_proj' in a form"
    ) as error:
        save_hf(model, config, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"num_local_experts": 10**9}, {}, r"gate_up_proj_blocks' has no entry 8, .* it is \[8, 64, 1, 16\]"),
        (
            {},
            {"model.layers.1.mlp.experts.down_proj_scales": None},
            r"down_proj_scales' is missing: by config\.json's quantization_config",
        ),
        (
            {},
            {"model.layers.1.mlp.experts.down_proj_scales": np.zeros((), np.uint8)},
            r"down_proj_scales' has no entry 0, .* it is \[\]",
        ),
        ({}, {"model.layers.1.extra": np.ones(1, np.float32)}, r"'model\.layers\.1\.extra' is not one of"),
        ({}, {"model.layers.2.extra": np.ones(1, np.float32)}, None),
        ({"quantization_config": {"quant_method": "hqq"}}, {}, "method 'hqq' is not read; .*'mxfp4'"),
        ({"quantization_config": "mxfp8"}, {}, "method 'mxfp8' is not read"),
        ({"quantization_config": {"bits": 4}}, {}, "method None is not read"),
        ({"quantization_config": {"quant_method": ["mxfp4"]}}, {}, r"method \['mxfp4'\] is not read"),
    ],
)
def test_what_a_family_reads_is_checked(config, tensors, message, tmp_path: Path, monkeypatch):
    given, stacked = forms.write_both(tmp_path, "mxfp4")
    monkeypatch.setitem(FAMILIES, hf_tiny.QWEN3, forms.stacking("mxfp4"))
    changed = {n: t for n, t in (stacked | tensors).items() if t is not None}
    hf_tiny.write_checkpoint(tmp_path / "stacked", given | config, tensors=changed)
    if message is None:
        load_model(tmp_path / "stacked", one_device())
        return
    with pytest.raises(ValueError, match=message) as error:
        load_model(tmp_path / "stacked", one_device())
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_method_may_be_named_without_a_table(tmp_path: Path):
    config = json.loads((GOLDEN / "gpt_oss" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": "mxfp4"}))
    assert read_config(tmp_path).quant_method == "mxfp4"


def test_a_float32_parameter_of_a_bfloat16_model_stays_so(tmp_path: Path, monkeypatch):
    def ones(make: ParamMaker, size: int, axes=(None,)) -> nnx.Param:
        return nnx.Param(jnp.ones((size,), jnp.float32), axes=axes)

    monkeypatch.setattr(ParamMaker, "ones", ones)
    config = hf_tiny.hf_config(dtype="bfloat16")
    norms = {
        n: np.float32(1) + np.arange(t.size, dtype=np.float32) / 2**20  # bfloat16 has none of them but 1
        for n, t in hf_tiny.random_tensors(config).items()
        if n.endswith("norm.weight")
    }
    hf_tiny.write_checkpoint(tmp_path / "hf", config, tensors=hf_tiny.random_tensors(config) | norms)
    model = load_model(tmp_path / "hf", one_device())
    np.testing.assert_array_equal(model.norm.scale_D[...], norms["model.norm.weight"])
    assert model.embed[...].dtype == ml_dtypes.bfloat16

    convert(tmp_path / "hf", tmp_path / "out")
    seen = []
    assert_same(load_model(tmp_path / "out", one_device(), progress=lambda *at: seen.append(at)), model)
    assert seen[-1][0] == seen[-1][1] == sum(v.nbytes for v in values(model).values())
    convert(tmp_path / "hf", tmp_path / "wide", dtype="float32")
    assert_same(load_model(tmp_path / "wide", one_device(), dtype="bfloat16"), model)

    save_hf(model, config, tmp_path / "saved")
    assert_same(load_model(tmp_path / "saved", one_device()), model)
    with HFCheckpoint(tmp_path / "saved") as saved:
        assert saved.tensors["model.norm.weight"].dtype == "F32"
        assert saved.tensors["model.embed_tokens.weight"].dtype == "BF16"


def test_layers_without_experts_have_no_row_in_a_placement():
    rows = np.array([[2, 0, 1], [1, 2, 0]])
    placement = Placement(rows, 1, "m")
    names = {name: f"moe.experts.{name}" for name in EXPERTS}
    routers = [f"moe.{name}" for name in ROUTERS]
    table = {
        f"layers.{i}.{path}": [StoredTensor(f"{i}.{name}", f"layers.{i}.{path}", (e,), e) for e in range(3)]
        for i in DENSE_BETWEEN
        for name, path in names.items()
    } | {"layers.0.mlp.down_DF": [StoredTensor("0", "layers.0.mlp.down_DF")]}
    moved = into_slots(table, placement, DENSE_BETWEEN)
    assert moved["layers.0.mlp.down_DF"] == table["layers.0.mlp.down_DF"]
    for row_P, layer in zip(rows, DENSE_BETWEEN, strict=True):
        for path in names.values():
            by_slot = {s.index: s.expert for s in moved[f"layers.{layer}.{path}"]}
            assert by_slot == {(slot,): expert for slot, expert in enumerate(row_P)}
        for name in (*routers, *names.values()):
            path, values = f"layers.{layer}.{name}", np.arange(6.0).reshape(3, 2)
            buffer = values.copy()
            permute_gate(path, buffer, placement, DENSE_BETWEEN)
            np.testing.assert_array_equal(buffer, values[row_P] if name in routers else values)
            array = permuted(path, jax.device_put(values, jax.devices()[0]), placement, DENSE_BETWEEN)
            np.testing.assert_array_equal(array, values[row_P])
    for path in ("layers.0.mlp.down_DF", "layers.0.attention.q_proj", "embed"):
        buffer = np.arange(6.0)
        permute_gate(path, buffer, placement, DENSE_BETWEEN)
        np.testing.assert_array_equal(buffer, np.arange(6.0))


def test_layers_without_experts_have_no_row_in_the_stacks():
    device, dtype = SingleDeviceSharding(jax.devices()[0]), np.dtype(np.float32)
    stacked = into_stacks(
        {f"layers.3.moe.experts.{name}": [StoredTensor("t", "p")] for name in EXPERTS}, (3,)
    )
    assert list(stacked) == [f"store.{name.replace('_E', '_LE')}" for name in EXPERTS]
    name, stack = "moe.experts.down_bias_ED", "store.down_bias_LED"
    table = {
        f"layers.{i}.{name}": [StoredTensor("b", f"layers.{i}.{name}", (e,), e) for e in range(3)]
        for i in DENSE_BETWEEN
    }
    [(path, parts)] = into_stacks(table, DENSE_BETWEEN).items()
    assert path == stack and {s.path for s in parts} == {stack}
    assert [s.index for s in parts] == [(layer, e) for layer in range(2) for e in range(3)]
    stacks = Stacks({stack: ParamSpec(stack, (2, 3, 4), dtype, dtype, device)}, DENSE_BETWEEN)
    for layer in DENSE_BETWEEN:
        assert stacks.take(f"layers.{layer}.{name}", jnp.full((3, 4), layer, dtype))
    assert not stacks.take("layers.0.mlp.down_DF", np.zeros(1))
    [(spec, buffer)] = stacks.items()
    assert spec.path == stack
    np.testing.assert_array_equal(buffer[:, 0, 0], DENSE_BETWEEN)
