"""DeepSeek-V3 as published, in tiny: E4M3 in blocks, of which the last ones are cut; no list of modules."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from support.models import compressed as ct
from support.models import hf_tiny

from jmoe.checkpoint import load_model, read_config
from jmoe.checkpoint.params import abstract_decoder
from jmoe.checkpoint.quantised.codings import read_codings
from jmoe.config.moe import MoEConfig
from jmoe.mesh import make_mesh
from jmoe.models import get_family, model_config
from jmoe.models.decoder import Decoder, make_blueprint
from jmoe.nn.sequences import Sequences

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"], "vocab_size": 96, "hidden_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 3, "num_key_value_heads": 3, "kv_lora_rank": 16, "q_lora_rank": 14,
    "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 8, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "moe_intermediate_size": 28, "intermediate_size": 52, "n_group": 4,
    "topk_group": 2, "first_k_dense_replace": 1, "rope_theta": 1e4, "torch_dtype": "float32",
}  # fmt: skip
BLOCK = (16, 24)


def write_models(directory, dtype, **changes):
    """Writes the model in blocks and its plain copy; returns their directories."""
    cfg = model_config(CONFIG)
    specs = abstract_decoder(make_blueprint(cfg, MoEConfig(), make_mesh(devices=jax.devices()[:1])))[1]
    rng, plain, stored = np.random.default_rng(0), {}, {}
    for tensor in get_family(cfg.architecture).names(cfg):
        shape = specs[tensor.path].shape[len(tensor.index) :]
        if tensor.name.endswith("_proj.weight") or "kv_a_proj_with_mqa" in tensor.name:
            assert len(shape) == 2
            tensors, plain[tensor.name] = ct.write_bytes(rng, shape, BLOCK, floats=True, dtype=dtype)
            stored |= {tensor.name: tensors[""], f"{tensor.name}_scale_inv": tensors["_scale"]}
        else:
            values = rng.standard_normal(shape) * 0.2 + tensor.name.endswith("norm.weight")
            plain[tensor.name] = stored[tensor.name] = values.astype(np.float32)
    quantisation = {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
        "weight_block_size": list(BLOCK),
    }  # fmt: skip
    hf_tiny.write_checkpoint(directory / "plain", CONFIG, tensors=plain)
    hf_tiny.write_checkpoint(
        directory / "stored", CONFIG | {"quantization_config": quantisation | changes}, tensors=stored
    )
    return directory / "stored", directory / "plain"


@nnx.jit
def logits(model: Decoder) -> jax.Array:
    tokens = jnp.arange(24, dtype=jnp.int32).reshape(4, 6)
    positions = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32), (4, 6))
    return model.logits(model(Sequences(tokens, positions)).hidden_RND)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_model_computes_as_its_dequantised_copy(dtype, tmp_path):
    stored, plain = write_models(tmp_path, dtype)
    got, want = (
        logits(load_model(each, make_mesh(devices=jax.devices()[:1]), MoEConfig(kernel="xla")))
        for each in (stored, plain)
    )
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    codings = read_codings(stored, read_config(stored))
    latent = "layers.0.attention."
    assert latent + "q_a_proj" in codings and latent + "kv_a_proj" in codings
    assert latent + "kv_b_proj" not in codings  # absorbed into queries and outputs, so it is dequantised


def test_blocks_of_another_size_than_the_configuration_says(tmp_path):
    stored, _ = write_models(tmp_path, np.float32, weight_block_size=[16, 16])
    with pytest.raises(ValueError, match=r"_scale_inv' must be \[\d+, \d+\] by config.json, it is \["):
        load_model(stored, make_mesh(devices=jax.devices()[:1]))
