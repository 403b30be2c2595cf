"""Compares models with logits and greedy tokens of transformers that ``scripts/make/golden.py`` wrote."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from jmoe import LLM, SamplingParams
from jmoe.checkpoint import convert, read_config
from jmoe.engine.deployment import settings as engine_settings
from jmoe.models import get_family, model_config

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = sorted(directory.name for directory in GOLDEN.iterdir())


def load(directory: Path) -> LLM:
    return LLM(directory, max_num_seqs=1, max_num_batched_tokens=64, warm_up=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_tokens_are_those_of_transformers(family: str, tmp_path: Path):
    golden = np.load(GOLDEN / family / "golden.npz")
    llm = load(GOLDEN / family)
    np.testing.assert_allclose(llm.logits(golden["tokens"]), golden["logits"], atol=1e-4)
    prompt, want = golden["prompt"].tolist(), golden["tokens"].tolist()
    params = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
    assert llm.generate([prompt], params)[0].outputs[0].token_ids == want[len(prompt) :]

    [scored] = llm.generate([prompt], SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1))
    assert scored.prompt_logprobs[0] is None
    assert [e.token_id for e in scored.prompt_logprobs[1:]] == prompt[1:]

    convert(GOLDEN / family, tmp_path / "orbax")
    again = load(tmp_path / "orbax").logits(golden["tokens"])
    np.testing.assert_allclose(again, golden["logits"], atol=1e-4)


def test_a_wrong_norm_would_be_seen(monkeypatch: pytest.MonkeyPatch):
    """The comparison can fail: if the weights are not renormalised as they should be, the logits differ."""
    directory = GOLDEN / "qwen3_moe"
    golden = np.load(directory / "golden.npz")
    cfg = read_config(directory)
    router = dataclasses.replace(cfg.router, norm_topk_prob=not cfg.router.norm_topk_prob)
    wrong_cfg = dataclasses.replace(cfg, router=router)
    monkeypatch.setattr(engine_settings, "read_config", lambda *args: wrong_cfg)
    wrong = load(directory).logits(golden["tokens"])
    assert np.abs(wrong - golden["logits"]).max() > 1e-2


def test_unknown_architectures_name_the_supported_and_the_nearest():
    with pytest.raises(ValueError, match=r"supported: MixtralForCausalLM, .*; nearest: Qwen3MoeForCausalLM"):
        get_family("Qwen4MoeForCausalLM")
    with pytest.raises(ValueError, match="must name one architecture, got \\[\\]"):
        model_config({})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "ntk", "rope_theta": 1e4}}, "rope type 'ntk' is not supported"),
        ({"mlp_only_layers": [0, 1]}, "every layer is dense"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"num_experts": None, "num_local_experts": None}, "no 'num_experts' or 'num_local_experts'"),
        ({"num_experts_per_tok": 99}, "num_experts_per_tok 99 exceeds num_experts"),
        ({"num_key_value_heads": 3}, "is not a multiple of num_key_value_heads 3"),
        ({"vocab_size": "many"}, "vocab_size must be a positive integer, got 'many'"),
    ],
)
def test_configs_that_are_not_implemented_are_refused_by_field(changes: dict, message: str):
    import json

    config = json.loads((GOLDEN / "qwen3_moe" / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        model_config(config | changes)
