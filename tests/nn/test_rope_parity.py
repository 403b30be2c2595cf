"""Compares the rotary frequencies of long contexts with transformers', and tests the choice of LongRoPE's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.models.parity import Case, logits_of, make

from jmoe import LLM
from jmoe.models.family import rope_config
from jmoe.nn.rope import frequencies

torch = pytest.importorskip("torch", reason="needs the parity extra")
transformers = pytest.importorskip("transformers", reason="needs the parity extra")
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

pytestmark = pytest.mark.parity

ORIGINAL = "original_max_position_embeddings"
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LISTS = {
    "short_factor": np.linspace(1, 2, 16).tolist(), "long_factor": np.geomspace(1, 40, 16).tolist(),
}  # fmt: skip
GIVEN: tuple[dict[str, Any], ...] = (
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e6},
    {"rope_type": "yarn", "factor": 40.0, ORIGINAL: 4096},
    {"rope_type": "yarn", "factor": 40.0, ORIGINAL: 4096, "mscale": 1.0, "mscale_all_dim": 1.0},
    {"rope_type": "yarn", "factor": 40.0, ORIGINAL: 4096, "mscale": 0.707, "mscale_all_dim": 0.5},
    {"rope_type": "yarn", "factor": 8.0, ORIGINAL: 64, "mscale": 0.707},
    {"rope_type": "yarn", "factor": 32.0, ORIGINAL: 4096, "truncate": False, "rope_theta": 150000.0},
    {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 32768, "beta_fast": 16, "beta_slow": 2, "rope_theta": 1e6},
    {"rope_type": "yarn", "factor": 1.0, ORIGINAL: 16, "attention_factor": 1.7},
    {"rope_type": "yarn", "factor": 0.5, ORIGINAL: 7},
    {**LLAMA3, "factor": 8.0, ORIGINAL: 8192, "rope_theta": 500000.0},
    {**LLAMA3, "factor": 16.0, ORIGINAL: 64, "low_freq_factor": 2.0, "high_freq_factor": 9.0},
    {"rope_type": "longrope", "factor": 32.0, ORIGINAL: 4096, **LISTS},
    {"rope_type": "longrope", "factor": 0.5, ORIGINAL: 64, **LISTS},
    {"rope_type": "longrope", "factor": 4.0, ORIGINAL: 64, "attention_factor": 1.3, **LISTS},
)


@pytest.mark.parametrize("tokens", [30, 200_000])
@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_frequencies_are_those_of_transformers(given: dict[str, Any], tokens: int):
    """Contexts are shorter and longer than the original one."""
    given = {"rope_theta": 10000.0} | given
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 131072}
    config = transformers.LlamaConfig(**sizes, head_dim=32, rope_parameters=dict(given))
    want, scale = ROPE_INIT_FUNCTIONS[given["rope_type"]](config, "cpu", seq_len=tokens)
    got, by = frequencies(32, rope_config({**sizes, "rope_parameters": given}).for_context(tokens))
    np.testing.assert_allclose(got, want.numpy(), rtol=2e-6)
    assert by == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("factor", [0.25, 0.5])
def test_a_part_of_a_head_is_rotated(factor: float):
    given = {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 64, "rope_theta": 1e4}
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 256}
    whole = given | {"partial_rotary_factor": factor}
    config = transformers.LlamaConfig(**sizes, head_dim=32, rope_parameters=dict(whole))
    want, _ = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    for hf in ({"rope_parameters": whole}, {"rope_scaling": given, "partial_rotary_factor": factor}):
        got, _ = frequencies(32, rope_config({**sizes, "rope_theta": 1e4, **hf}))
        np.testing.assert_allclose(got, want.numpy(), rtol=2e-6)


def test_an_engine_for_long_contexts_rotates_by_the_long_factors(tmp_path: Path):
    """A max_model_len beyond the original 32 tokens decides; in transformers each window's length does."""
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, ORIGINAL: 32,
        "short_mscale": 1.1, "long_mscale": 1.4,
        "short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.0, 2.0, 4.0, 8.0],
    }  # fmt: skip
    fields = {
        "vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_local_experts": 6, "intermediate_size": 20, "rope_parameters": rope,
    }  # fmt: skip
    model = make(Case("phi", transformers.PhimoeConfig, fields), tmp_path / "hf")
    ids = np.random.default_rng(0).integers(0, 97, 48)
    of_length = ROPE_INIT_FUNCTIONS["longrope"]
    for longest, tokens in ((32, 24), (33, 33), (64, 48)):
        # Phimoe's own call leaves the length out, and so gets the short factors at every length
        model.model.rotary_emb.rope_init_fn = lambda config, n=tokens: of_length(config, "cpu", seq_len=n)
        with LLM(tmp_path / "hf", max_model_len=longest, max_num_seqs=1, warm_up=False) as llm:
            assert llm.engine.runner.model.cfg.rope.long == (longest > 32)
            np.testing.assert_allclose(llm.logits(ids[:tokens]), logits_of(model, ids[:tokens]), atol=1e-4)
