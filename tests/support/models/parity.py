"""Random transformers models on disk, and what parity with them means."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from jmoe import LLM, SamplingParams
from jmoe.checkpoint import convert

torch = pytest.importorskip("torch", reason="needs the parity extra")
transformers = pytest.importorskip("transformers", reason="needs the parity extra")

torch.set_num_threads(1)  # matrices are small, and threads that spin take the core of another worker

LENGTH, NEW = 24, 64
COMMON = {"num_hidden_layers": 2, "max_position_embeddings": 128, "initializer_range": 0.15}


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    config: type
    fields: dict
    seed: int = 0


def make(case: Case, directory: Path):
    """Saves a random transformers model and returns it.

    Norms, biases and routers are random too, so that they matter.
    """
    torch.manual_seed(case.seed)
    config = case.config(**COMMON | case.fields, eos_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.normal_(std=0.2)
            elif name.endswith(("gate.weight", "router.weight")):
                parameter.mul_(8.0)
            elif name.endswith("sinks"):
                parameter.normal_()
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.3)
    model.save_pretrained(directory)
    return model


def small(directory: Path, **changes) -> LLM:
    """Returns an engine that compiles no more than what a test runs."""
    sizes = {"max_model_len": LENGTH + NEW, "max_num_seqs": 1, "max_num_batched_tokens": 64}
    return LLM(directory, **sizes, warm_up=False, **changes)


def logits_of(model, ids) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([list(map(int, ids))])).logits[0].float().numpy()


def assert_parity(case: Case, tmp_path: Path, *, converted_too: bool) -> None:
    """Asserts the same logits at every position, greedy tokens and log-probabilities.

    converted_too: whether a conversion must give the same.
    """
    model = make(case, tmp_path / "hf")
    llm = small(tmp_path / "hf")
    ids = np.random.default_rng(case.seed).integers(0, case.fields["vocab_size"], LENGTH)
    params = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True, logprobs=0)
    [output] = llm.generate([ids.tolist()], params)
    tokens = output.outputs[0].token_ids
    every = [*ids, *tokens[:-1]]
    theirs = logits_of(model, every)
    # Each token is the argmax after the earlier ones: by induction the model's greedy loop makes the same.
    assert tokens == theirs[LENGTH - 1 :].argmax(-1).tolist()
    np.testing.assert_allclose(llm.logits(every), theirs, atol=1e-4)
    full = llm.logits(every)[LENGTH - 1 :]
    want = full - np.log(np.exp(full - full.max(-1, keepdims=True)).sum(-1, keepdims=True))
    want -= full.max(-1, keepdims=True)
    got = [entry.logprob for entry in output.outputs[0].logprobs]
    np.testing.assert_allclose(
        got, want[np.arange(NEW), tokens], atol=1e-4, err_msg="decode against full forward"
    )
    if converted_too:
        convert(tmp_path / "hf", tmp_path / "orbax")
        converted = small(tmp_path / "orbax")
        assert converted.generate([ids.tolist()], params)[0].outputs[0].token_ids == tokens
        np.testing.assert_array_equal(converted.logits(every), llm.logits(every))
