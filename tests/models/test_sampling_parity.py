"""Compares greedy answers with penalties and limits on tokens with those of transformers."""

import dataclasses

import pytest
from support.models.parity import Case, make, small

from jmoe import SamplingParams

torch = pytest.importorskip("torch", reason="needs the parity extra")
transformers = pytest.importorskip("transformers", reason="needs the parity extra")

pytestmark = pytest.mark.parity

FIELDS = {
    "vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1,
}  # fmt: skip
CASE = Case("Qwen3-MoE", transformers.Qwen3MoeConfig, FIELDS)
PROMPT, NEW = [5, 9, 5, 17, 40, 41, 9], 32
GREEDY = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)


def test_greedy_answers_are_those_of_transformers(tmp_path):
    model = make(CASE, tmp_path)

    def theirs(**given) -> list[int]:
        ids = torch.tensor([PROMPT])
        given |= {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": NEW}
        out = model.generate(ids, do_sample=False, **given)
        return out[0, len(PROMPT) :].tolist()

    with small(tmp_path) as llm:

        def ours(**given) -> list[int]:
            [output] = llm.generate([PROMPT], dataclasses.replace(GREEDY, **given))
            return output.outputs[0].token_ids

        free = ours()
        assert free == theirs()
        answers = [free]
        for penalty in (0.8, 1.2, 1.5):
            answers.append(ours(repetition_penalty=penalty))
            assert answers[-1] == theirs(repetition_penalty=penalty)
        allowed = tuple(range(0, 96, 2))
        answers.append(ours(allowed_token_ids=allowed))
        assert answers[-1] == theirs(suppress_tokens=[t for t in range(96) if t not in allowed])
        assert len({tuple(answer) for answer in answers}) > 3, "the fields change the answer"
