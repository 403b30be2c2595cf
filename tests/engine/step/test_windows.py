"""Tests whole windows on meshes of any size: ``LLM.logits``, ``jmoe eval``, and refusals."""

from pathlib import Path

import numpy as np
import pytest
from support.models import hf_tiny

from jmoe import LLM
from jmoe.config.moe import MoEConfig
from jmoe.engine.deployment.settings import EngineSettings
from jmoe.engine.step.windows import window_length
from jmoe.tools.evaluate import evaluate

VOCAB = 256
SIZES = {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 64, "kv_memory": 4 << 20}
PROMPTS = [np.random.default_rng(n).integers(0, VOCAB, n).tolist() for n in (1, 2, 7)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    heads = {"num_attention_heads": 6, "num_key_value_heads": 6}
    hf_tiny.write_checkpoint(directory, hf_tiny.hf_config(vocab_size=VOCAB, num_local_experts=12, **heads))
    hf_tiny.write_tokenizer(directory)
    (directory / "text.txt").write_text("Three ranks and six share what one would have alone. " * 6)
    return directory


@pytest.fixture(scope="module")
def alone(model: Path) -> list[np.ndarray]:
    with LLM(model, warm_up=False, **SIZES) as llm:
        return [llm.logits(prompt) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("ranks", "attention"),
    [(3, "tp"), (6, "tp"), pytest.param(6, "dp", marks=pytest.mark.matrix)],
)
def test_logits_on_ranks_that_are_no_power_of_two(model: Path, alone, ranks: int, attention):
    with LLM(model, warm_up=False, expert_parallel_size=ranks, attention=attention, **SIZES) as llm:
        for prompt, want in zip(PROMPTS, alone, strict=True):
            np.testing.assert_allclose(llm.logits(prompt), want, atol=1e-4)


@pytest.mark.parametrize("mode", ["decode", pytest.param("prefill", marks=pytest.mark.matrix)])
def test_eval_of_a_batch_that_the_ranks_do_not_divide(model: Path, mode):
    """Four windows are on three ranks that share their heads."""
    losses = []
    for ranks in ({}, {"expert_parallel_size": 3, "attention": "tp"}):
        settings = EngineSettings(**SIZES, **ranks)
        given = {"mode": mode, "batch_size": 4, "max_tokens": 60, "settings": settings}
        losses.append(evaluate(str(model), [model / "text.txt"], **given)["nll_per_token"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("tokens", "sharing", "least", "length"),
    [(1, 1, 1, 1), (1, 3, 1, 3), (1, 6, 1, 6), (3, 3, 1, 6), (7, 6, 1, 12), (5, 2, 64, 64), (65, 3, 64, 129)],
)
def test_a_window_is_a_whole_number_for_each_rank(tokens: int, sharing: int, least: int, length: int):
    assert window_length(tokens, sharing, least) == length


def test_a_setting_of_training_is_refused_in_one_line():
    moe = MoEConfig(kernel="batched", train_capacity_factor=1.5)
    with pytest.raises(ValueError, match=r"^moe\.train_capacity_factor = 1\.5 is for training only[^\n]*$"):
        EngineSettings(moe=moe)
    EngineSettings(moe=MoEConfig(kernel="batched"))
