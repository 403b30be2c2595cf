"""A whole model of compressed-tensors computes what its dequantised copy computes; contradictions between the
configuration and the tensors are refused with both."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jmoe_kernels.quantised import coding_of
from safetensors.numpy import load_file, save_file
from support.models import compressed as ct

from jmoe.checkpoint import convert, load_model, read_config
from jmoe.checkpoint.quantised.codings import read_codings
from jmoe.config.moe import MoEConfig
from jmoe.mesh import make_mesh
from jmoe.models.decoder import Decoder
from jmoe.nn.sequences import Sequences

IGNORED = ("lm_head", "re:.*mlp.gate$")
WHOLE = (
    "int4 g32", "int4 g32 with zeros", "int8 g32", "W8A8", "FP8 in all, static", "FP8 in blocks", "NVFP4",
    "MXFP4", "MXFP8",
)  # fmt: skip
Q_PROJ = "model.layers.0.self_attn.q_proj"


PORTABLE = MoEConfig(kernel="xla")  # it rounds no activations


def one_device():
    return make_mesh(devices=jax.devices()[:1])


@nnx.jit
def logits(model: Decoder) -> jax.Array:
    tokens = jnp.arange(24, dtype=jnp.int32).reshape(4, 6)
    positions = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32), (4, 6))
    return model.logits(model(Sequences(tokens, positions)).hidden_RND)


def assert_equal_logits(stored, plain) -> None:
    got, want = (logits(load_model(directory, one_device(), PORTABLE)) for directory in (stored, plain))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("case", WHOLE)
def test_a_model_computes_as_its_dequantised_copy(case, tmp_path):
    form = ct.CASES[case]
    stored, plain = ct.write_models(tmp_path, form, form.config(*IGNORED))
    assert_equal_logits(stored, plain)
    codings = read_codings(stored, read_config(stored))
    products = ("q_proj", "k_proj", "v_proj", "o_proj", "experts.gate_up_E2FD", "experts.down_EDF")
    assert len(codings) == 2 * len(products) and all(path.endswith(products) for path in codings)


def test_a_converted_model_on_eight_devices(tmp_path):
    """Eight devices share the experts and cut their rows in two; conversion keeps codes, scales and lows."""
    form = ct.CASES["int4 g32 with zeros"]
    stored, plain = ct.write_models(tmp_path, form, form.config(*IGNORED))
    convert(stored, tmp_path / "converted")
    want = logits(load_model(plain, one_device(), PORTABLE))
    for directory in (stored, tmp_path / "converted"):
        mesh = make_mesh(data=2, expert=2, tensor=2, devices=jax.devices()[:8])
        model = load_model(directory, mesh, PORTABLE)
        codings = read_codings(stored, model.cfg)
        assert coding_of(model.expert_weights.down_EDF) == codings["layers.0.moe.experts.down_EDF"]
        np.testing.assert_allclose(logits(model), want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_kimis_experts_alone(tmp_path):
    """Kimi-K2.5: experts in four bits, everything else plain by patterns."""
    form = ct.CASES["int4 g32"]
    config = form.config("lm_head", "re:.*self_attn.*", "re:.*mlp.gate$")
    stored, plain = ct.write_models(
        tmp_path, form, config, lambda name: ".experts." in name and name.endswith("_proj.weight")
    )
    assert_equal_logits(stored, plain)
    assert all(".experts." in path for path in read_codings(stored, read_config(stored)))


def test_parameters_that_are_more_than_products_are_dequantised(tmp_path):
    """The router and the embedding may be stored quantised; the parameter is plain."""
    form = ct.CASES["W8A8"]
    config = form.config()
    config["config_groups"]["group_0"]["targets"] = ["Linear", "Embedding"]
    ends = ("_proj.weight", "mlp.gate.weight", "embed_tokens.weight", "lm_head.weight")
    stored, plain = ct.write_models(tmp_path, form, config, lambda name: name.endswith(ends))
    assert_equal_logits(stored, plain)
    codings = read_codings(stored, read_config(stored))
    assert "lm_head" in codings and "embed" not in codings
    assert not any("router" in path for path in codings)


def test_scales_of_the_cache_and_of_activations_are_not_read(tmp_path):
    form = ct.CASES["W8A8"]
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    stored, _ = ct.write_models(tmp_path, form, form.config(*IGNORED, kv_cache_scheme=scheme))
    tensors = load_file(stored / "model.safetensors")
    for layer in range(2):
        for name in ("k_scale", "v_scale", "k_proj.output_scale", "q_proj.input_scale"):
            tensors[f"model.layers.{layer}.self_attn.{name}"] = np.ones(1, np.float32)
    save_file(tensors, stored / "model.safetensors")
    load_model(stored, one_device())
    tensors["model.layers.0.self_attn.x_scale"] = np.ones(1, np.float32)
    save_file(tensors, stored / "model.safetensors")
    with pytest.raises(ValueError, match=r"x_scale' is not one of Qwen3MoeForCausalLM"):
        load_model(stored, one_device())


def refusal(directory) -> str:
    with pytest.raises(ValueError) as error:
        load_model(directory, one_device())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_contradictions_name_both_sides(tmp_path):
    form = ct.CASES["int4 g32"]
    stored, _ = ct.write_models(tmp_path, form, form.config(*IGNORED))

    ct.write_config(stored, form.config(*IGNORED, Q_PROJ))
    text = refusal(stored)
    assert f"'{Q_PROJ}.weight_packed' has dtype I32, but by config.json's" in text
    assert f"ignore: '{Q_PROJ}' leaves it plain" in text

    fp8 = ct.CASES["FP8 a row"]
    ct.write_config(stored, fp8.config(*IGNORED))
    text = refusal(stored)
    assert f"'{Q_PROJ}.weight_packed' has dtype I32, but by config.json's" in text
    assert (
        f"config_groups.group_0 for 'Linear' needs '{Q_PROJ}.weight' and '{Q_PROJ}.weight_scale' (fp8)"
        in text
    )

    path = stored / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in values.items() if key != "quantization_config"}))
    text = refusal(stored)
    assert (
        "weight_packed' has dtype I32, but by config.json, which has no quantization_config: no rule" in text
    )

    ct.write_config(stored, form.config(*IGNORED))
    tensors = load_file(stored / "model.safetensors")
    expert = "model.layers.1.mlp.experts.3.down_proj"
    scale = tensors.pop(f"{expert}.weight_scale")
    save_file(tensors, stored / "model.safetensors")
    assert f"'{expert}.weight_scale' is missing: by config.json's quantization_config" in refusal(stored)

    tensors[f"{expert}.weight_scale"] = scale
    tensors[f"{Q_PROJ}.weight_g_idx"] = np.arange(64, dtype=np.int32)
    save_file(tensors, stored / "model.safetensors")
    assert f"'{Q_PROJ}.weight_g_idx' is not one of" in refusal(stored)


def test_a_product_that_is_plain_against_the_rules(tmp_path):
    form = ct.CASES["W8A8"]
    expert = "model.layers.1.mlp.experts.3.down_proj"
    stored, plain = ct.write_models(
        tmp_path, form, form.config(), lambda name: ct.is_product(name) and expert not in name
    )
    text = refusal(stored)  # lm_head and the router are plain too, and may be
    assert f"'{expert}.weight' has dtype F32, but by config.json's quantization_config" in text
    assert (
        f"config_groups.group_0 for 'Linear' needs '{expert}.weight' and '{expert}.weight_scale' (int8)"
        in text
    )
    ct.write_config(stored, form.config("model.layers.1.mlp.experts.3.down_proj"))
    assert_equal_logits(stored, plain)


def test_tensors_of_another_method(tmp_path):
    form = ct.CASES["int4 g32"]
    stored, _ = ct.write_models(tmp_path, form, form.config(*IGNORED))
    tensors = load_file(stored / "model.safetensors")
    for suffix in ("_packed", "_scale", "_shape"):
        del tensors[f"{Q_PROJ}.weight{suffix}"]
    tensors[f"{Q_PROJ}.qweight"] = np.zeros((8, 64), np.int32)
    save_file(tensors, stored / "model.safetensors")
    text = refusal(stored)
    assert f"'{Q_PROJ}.qweight' has dtype I32, but by config.json's" in text and "weight_packed' and" in text
    del tensors[f"{Q_PROJ}.qweight"]
    save_file(tensors, stored / "model.safetensors")
    assert f"tensor '{Q_PROJ}.weight' is missing" in refusal(stored)


@pytest.mark.parity
@pytest.mark.parametrize("case", ct.CASES)
def test_the_package_that_writes_these_formats_reads_the_same_numbers(case):
    torch = pytest.importorskip("torch")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    schemes = pytest.importorskip("compressed_tensors.quantization")
    form = ct.CASES[case]
    tensors, numbers = form.write(np.random.default_rng(0), (48, 160))

    def theirs(array: np.ndarray):
        same = {2: np.int16, 1: np.uint8}.get(array.itemsize, array.dtype)
        kinds = {ct.BFLOAT16: torch.bfloat16, ct.E4M3: torch.float8_e4m3fn}
        if array.dtype not in kinds:
            return torch.from_numpy(array.copy())
        return torch.from_numpy(array.view(same).copy()).view(kinds[array.dtype])

    state = {f"weight{key}": theirs(array) for key, array in tensors.items() if not key.startswith("/")}
    if state["weight_scale"].dtype in (torch.bfloat16, torch.float16):  # it multiplies in this dtype
        state["weight_scale"] = state["weight_scale"].float()
    weights = {key: value for key, value in form.weights.items() if value is not None}
    scheme = schemes.QuantizationScheme.model_validate({"targets": ["Linear"], "weights": weights})
    reader = compressors.BaseCompressor.get_value_from_registry(form.format)
    got = reader.decompress(state, scheme)["weight"].float().numpy()
    off = np.abs(got - numbers).max() / np.abs(numbers).max()
    assert off == 0 if case != "NVFP4" else off < 4e-3  # it computes NVFP4 in bfloat16
