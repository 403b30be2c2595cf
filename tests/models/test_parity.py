"""Compares random checkpoints of transformers with its logits and greedy tokens.

transformers has several implementations of the experts. The tests match its default (grouped_mm), and check
that the eager loop agrees with it.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from support.models.parity import LENGTH, Case, assert_parity, logits_of, make, small

torch = pytest.importorskip("torch", reason="needs the parity extra")
transformers = pytest.importorskip("transformers", reason="needs the parity extra")
pytestmark = pytest.mark.parity

SEEDS = (0, 1)  # one shape for all, so that only the first compiles


QWEN3, MIXTRAL, OLMOE = transformers.Qwen3MoeConfig, transformers.MixtralConfig, transformers.OlmoeConfig
QWEN3_SIZES = {
    "vocab_size": 101,
    "hidden_size": 36,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
}
MIXTRAL_SIZES = {
    "vocab_size": 97,
    "hidden_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "intermediate_size": 20,
}
OLMOE_SIZES = {
    "vocab_size": 89,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "intermediate_size": 12,
}
CASES = (
    Case("qwen3", QWEN3, QWEN3_SIZES | {"norm_topk_prob": True}),
    Case(
        "qwen3-tied-one-kv-head",
        QWEN3,
        QWEN3_SIZES | {"tie_word_embeddings": True, "num_key_value_heads": 1},
        1,
    ),
    Case(
        "qwen3-bias-all-experts", QWEN3, QWEN3_SIZES | {"attention_bias": True, "num_experts_per_tok": 6}, 2
    ),
    Case(
        "qwen3-window",
        QWEN3,
        QWEN3_SIZES | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
        3,
    ),
    Case("qwen3-top-1", QWEN3, QWEN3_SIZES | {"num_experts_per_tok": 1, "norm_topk_prob": True}, 4),
    Case("mixtral", MIXTRAL, MIXTRAL_SIZES),
    Case("mixtral-window", MIXTRAL, MIXTRAL_SIZES | {"sliding_window": 5}, 1),
    Case("mixtral-head-dim-tied", MIXTRAL, MIXTRAL_SIZES | {"head_dim": 6, "tie_word_embeddings": True}, 2),
    Case("olmoe", OLMOE, OLMOE_SIZES),
    Case(
        "olmoe-renormalised-gqa", OLMOE, OLMOE_SIZES | {"norm_topk_prob": True, "num_key_value_heads": 2}, 1
    ),
    Case("qwen3-dense-layers", QWEN3, QWEN3_SIZES | {"mlp_only_layers": [0], "num_hidden_layers": 3}, 5),
    Case("qwen3-sparse-step", QWEN3, QWEN3_SIZES | {"decoder_sparse_step": 2, "num_hidden_layers": 4}, 6),
    Case("olmoe-clipped", OLMOE, OLMOE_SIZES | {"clip_qkv": 0.4}, 3),
    Case("olmoe-bias-tied", OLMOE, OLMOE_SIZES | {"attention_bias": True, "tie_word_embeddings": True}, 2),
)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_logits_and_greedy_tokens(case: Case, seed: int, tmp_path: Path):
    case = dataclasses.replace(case, seed=10 * seed + case.seed)
    assert_parity(case, tmp_path, converted_too=seed == SEEDS[0])


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("qwen3", "mixtral", "olmoe")], ids=lambda c: c.name
)
def test_transformers_4_spelling_loads_the_same(case: Case, tmp_path: Path):
    make(case, tmp_path)
    path = tmp_path / "config.json"
    want = small(tmp_path).logits([1, 2, 3, 4])
    config = json.loads(path.read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    if "num_local_experts" in config and case.config is not MIXTRAL:
        config["num_experts"] = config.pop("num_local_experts")
    path.write_text(json.dumps(config))
    np.testing.assert_array_equal(small(tmp_path).logits([1, 2, 3, 4]), want)


def test_both_expert_implementations_are_matched(tmp_path: Path):
    make(CASES[0], tmp_path)
    ids = np.arange(1, 20)
    want = small(tmp_path).logits(ids)
    for implementation in ("eager", "grouped_mm"):
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(tmp_path, experts_implementation=implementation).eval()
        np.testing.assert_allclose(logits_of(model, ids), want, atol=1e-4)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("qwen3", "mixtral", "olmoe")], ids=lambda c: c.name
)
def test_bfloat16_is_as_close_to_float32_as_transformers_is(case: Case, tmp_path: Path):
    make(case, tmp_path / "f32").to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(tmp_path / "bf16", dtype=torch.bfloat16, experts_implementation="eager").eval()
    exact = load(tmp_path / "bf16", dtype=torch.float32).eval()
    ids = np.random.default_rng(5).integers(0, case.fields["vocab_size"], LENGTH)
    want = logits_of(exact, ids)
    error = lambda logits: np.abs(logits - want).mean()  # noqa: E731
    assert error(small(tmp_path / "bf16").logits(ids)) < 1.5 * error(logits_of(theirs, ids))


def test_a_mesh_has_the_same_logits(tmp_path: Path):
    case = dataclasses.replace(CASES[0], fields=QWEN3_SIZES | {"num_experts": 8})
    model = make(case, tmp_path)
    llm = small(tmp_path, data_parallel_size=2, expert_parallel_size=2, tensor_parallel_size=2)
    ids = np.arange(2, 26)
    np.testing.assert_allclose(llm.logits(ids), logits_of(model, ids), atol=1e-4)


VALID = Path(__file__).parents[3] / "shared" / "data" / "valid"


def test_eval_perplexity_of_the_bundled_model(tmp_path: Path):
    """The protocol of ``jmoe eval`` is restated on transformers: windows whose first token is not scored."""
    from tokenizers import Tokenizer

    from jmoe.engine.deployment.settings import BUNDLED
    from jmoe.tools.data import read_documents, round_robin
    from jmoe.tools.evaluate import evaluate

    if not VALID.is_dir():
        pytest.skip("shared/data/valid is not next to the repository")
    data, limit = sorted(VALID.glob("*.txt.xz"))[:3], 6000
    report = evaluate(str(BUNDLED["tiny"]), data, batch_size=4, max_tokens=limit)
    model = transformers.AutoModelForCausalLM.from_pretrained(BUNDLED["tiny"], dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(BUNDLED["tiny"] / "tokenizer.json"))
    nll = tokens = 0
    for document in round_robin([read_documents(path) for path in data]):
        ids = tokenizer.encode(document).ids
        for start in range(0, len(ids), 1024):
            window = ids[start : start + 1024][: limit - tokens + 1]
            if len(window) > 1 and tokens < limit:
                logits = torch.tensor(logits_of(model, window))
                nll += torch.nn.functional.cross_entropy(
                    logits[:-1], torch.tensor(window[1:]), reduction="sum"
                ).item()
                tokens += len(window) - 1
        if tokens >= limit:
            break
    assert report["tokens"] == tokens == limit
    assert report["perplexity"] == pytest.approx(np.exp(nll / tokens), rel=5e-3)
