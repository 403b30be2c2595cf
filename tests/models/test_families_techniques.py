"""Tests every technique and mesh on each further family, by the tokens and logits of golden models."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from support.models.engines import serve

from jmoe import LLM, MoEConfig, SamplingParams
from jmoe.checkpoint import load_model, read_config
from jmoe.checkpoint.identity import model_identity
from jmoe.config.techniques import BinningConfig, CapacityConfig, OffloadConfig, ShuffleConfig
from jmoe.mesh import make_mesh
from jmoe.placement.placement import Placement
from jmoe.placement.tables import Tables

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = (
    "qwen2_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "phimoe", "gpt_oss", "llama4", "granitemoe",
)  # fmt: skip
ALWAYS = ("deepseek_v3", "gpt_oss")  # other families run with the long tables
OFFLOADED_ON_A_MESH = ("qwen2_moe", "llama4")
SIZES = {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 32, "warm_up": False}
LENGTHS = (20, 31, 23, 26)  # of prompts; transformers generated longer texts, which tell how each goes on
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=0)
EXACT = dataclasses.replace(GREEDY, exact=True)
EXPERTS = 8


@pytest.fixture(scope="module", autouse=True)
def forget_compiled():
    yield
    jax.clear_caches()


class Expected:
    """The expected answers of a model: prompts, greedy tokens after them, and their log-probabilities."""

    def __init__(self, family: str):
        golden = np.load(GOLDEN / family / "golden.npz")
        whole, logits = golden["tokens"].tolist(), golden["logits"].astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        ends = [n + GREEDY.max_tokens for n in LENGTHS]
        self.prompts = [whole[:n] for n in LENGTHS]
        self.tokens = [whole[n:end] for n, end in zip(LENGTHS, ends, strict=True)]
        self.logprobs = [
            [logprobs[i - 1, whole[i]] for i in range(n, end)] for n, end in zip(LENGTHS, ends, strict=True)
        ]

    def check(self, llm: LLM) -> None:
        outputs = [o.outputs[0] for o in llm.generate(self.prompts, GREEDY)]
        assert [o.token_ids for o in outputs] == self.tokens
        got = [[entry.logprob for entry in o.logprobs] for o in outputs]
        np.testing.assert_allclose(got, self.logprobs, atol=1e-4)


def build(family: str, moe: MoEConfig, shape: tuple[int, int, int] = (1, 1, 1), **options) -> LLM:
    axes = ("data_parallel_size", "expert_parallel_size", "tensor_parallel_size")
    return LLM(GOLDEN / family, moe=moe, **SIZES, **dict(zip(axes, shape, strict=True)), **options)


def random_placement(path: Path, family: str, ranks: int, layers: int | None = None) -> str:
    """Writes a placement: experts anywhere, and guesses that have nothing to do with them."""
    model = load_model(GOLDEN / family, make_mesh(devices=jax.devices()[:1]))
    layers, rng = layers or len(model.cfg.moe_layers), np.random.default_rng(7)

    def shares(count: int) -> tuple[np.ndarray, ...]:
        share = rng.dirichlet(np.ones(ranks), (layers, count)).astype(np.float16)
        return share.argmax(-1).astype(np.int16), share.max(-1), share

    rows = rng.permuted(np.tile(np.arange(EXPERTS), (layers, 1)), axis=1)
    tables = Tables(*shares(model.cfg.vocab_size), *shares(ranks * ranks))
    Placement(rows, ranks, model_identity(model), tables).save(path / "placement.npz")
    return str(path / "placement.npz")


def some_always(families: Sequence[str], always: Sequence[str] = ALWAYS) -> list[Any]:
    return [f if f in always else pytest.param(f, marks=pytest.mark.matrix) for f in families]


@pytest.mark.parametrize("family", some_always([f for f in FAMILIES if f not in OFFLOADED_ON_A_MESH]))
def test_a_mesh_of_renumbered_experts_gives_the_same(tmp_path: Path, family: str):
    """The other families are renumbered on a mesh together with offload, in a test below."""
    shuffle = ShuffleConfig(random_placement(tmp_path, family, 2), tokens=False)
    with build(family, MoEConfig(shuffle=shuffle), (2, 2, 2)) as llm:
        Expected(family).check(llm)
        assert llm.engine.moe_stats()["decode"]["dropped"] == 0


@pytest.mark.parametrize("family", some_always(["deepseek_v2", "gpt_oss"]))
def test_shared_heads_and_shuffled_tokens_give_the_same(tmp_path: Path, family: str):
    shuffle = ShuffleConfig(random_placement(tmp_path, family, 2), history=True)
    moe = MoEConfig(transport="ragged_all_to_all", shuffle=shuffle)
    with build(family, moe, (1, 2, 2), attention="tp") as llm:
        Expected(family).check(llm)
        assert llm.engine.moe_stats()["decode"]["remote_assignments"] > 0


@pytest.mark.parametrize("family", some_always(FAMILIES, ("gpt_oss",)))
def test_offload_is_lossless_and_exact_requests_are_left_alone(family: str):
    """A quarter of the experts is on the device, with a limit in prefill and binning in decode.

    There is one engine, since its compilation is what takes time. Exact requests get what a plain engine
    gives them.
    """
    want = Expected(family)
    capacity = CapacityConfig(factor=0.5, policy="reroute", phase="prefill")
    # under "affinity" every token keeps its best expert, and Llama 4 has one expert per token
    binning = BinningConfig("budget", keep=0.25) if family == "llama4" else BinningConfig(bin_width=0.05)
    executor = "host" if FAMILIES.index(family) % 2 else "graph"
    offload = OffloadConfig(slots_per_layer=EXPERTS // 4, executor=executor)
    with build(family, MoEConfig(binning=binning, capacity=capacity, offload=offload)) as llm:
        requests, outputs = serve(llm.engine, want.prompts, [EXACT] * 4)
        assert [r.token_ids for r in requests] == want.tokens
        assert all(parts[-1].moe.remapped == parts[-1].moe.rerouted == 0 for parts in outputs)
        stats = llm.engine.moe_stats()
        assert stats["decode"]["remapped"] == stats["prefill"]["rerouted"] == 0
        assert stats["decode"]["expert_cache_misses"] > 0

        requests, outputs = serve(llm.engine, want.prompts, [GREEDY, EXACT, GREEDY, GREEDY])
        stats, usages = llm.engine.moe_stats(), [parts[-1].moe for parts in outputs]
    assert requests[1].token_ids == want.tokens[1]
    assert usages[1].remapped == usages[1].rerouted == usages[1].dropped == 0
    assert sum(u.remapped for u in usages) == stats["decode"]["remapped"] > 0
    assert sum(u.rerouted for u in usages) == stats["prefill"]["rerouted"] > 0
    assert stats["decode"]["active_experts"] < stats["decode"]["active_experts_baseline"]


@pytest.mark.matrix
@pytest.mark.parametrize("family", ["gpt_oss", *OFFLOADED_ON_A_MESH])
def test_offloading_on_a_mesh_of_renumbered_experts_gives_the_same(tmp_path: Path, family: str):
    """Biases are added once, though an expert is split over two tensor ranks.

    The families differ in what renumbering and offloading touch: biases, a shared expert, weighed inputs.
    """
    shuffle = ShuffleConfig(random_placement(tmp_path, family, 2), tokens=False)
    moe = MoEConfig(shuffle=shuffle, offload=OffloadConfig(slots_per_layer=EXPERTS // 4))
    with build(family, moe, (1, 2, 2)) as llm:
        Expected(family).check(llm)
        assert llm.engine.moe_stats()["decode"]["expert_cache_misses"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mesh_that_splits_no_experts_is_refused(family: str):
    with pytest.raises(ValueError, match=r"expert parallel size 3 does not divide .* 8; it can be one of"):
        build(family, MoEConfig(), (1, 3, 1))


@pytest.mark.parametrize("family", ["qwen2_moe", "phimoe", "granitemoe", "gpt_oss", "deepseek_v3"])
def test_binning_is_refused_where_every_expert_is_used(tmp_path: Path, family: str):
    """The sparse mixer and groups allow no such model in the first place, and say so."""
    shutil.copytree(GOLDEN / family, tmp_path / "all")
    config = json.loads((GOLDEN / family / "config.json").read_text()) | {"num_experts_per_tok": EXPERTS}
    (tmp_path / "all" / "config.json").write_text(json.dumps(config))
    messages = {
        "phimoe": "the sparse mixer chooses 2 experts, num_experts_per_tok is 8",
        "deepseek_v3": "topk_group 2 groups have 4 experts, below num_experts_per_tok 8",
    }
    message = messages.get(family, "more experts than a token uses: this model has 8 and uses 8")
    with pytest.raises(ValueError, match=message):
        LLM(tmp_path / "all", moe=MoEConfig(binning=BinningConfig()), **SIZES)


def test_methods_that_one_expert_a_token_leaves_no_room_for_are_refused():
    with pytest.raises(ValueError, match=r"moe\.binning\.k0 must be from 1 to the model's 1 experts a token"):
        build("llama4", MoEConfig(binning=BinningConfig("oea")))
    for nothing in (BinningConfig(), BinningConfig("oea", k0=1)):
        with pytest.raises(ValueError, match="has no effect on a model with 1 expert a token"):
            build("llama4", MoEConfig(binning=nothing))


@pytest.mark.parametrize("family", ["deepseek_v2", "glm4_moe", "llama4"])
def test_a_placement_has_a_row_for_each_layer_with_experts(tmp_path: Path, family: str):
    layers = read_config(GOLDEN / family).num_hidden_layers
    shuffle = ShuffleConfig(random_placement(tmp_path, family, 2, layers), tokens=False)
    with pytest.raises(ValueError, match=f"MoE layers {layers}, here 2"):
        build(family, MoEConfig(shuffle=shuffle), (1, 2, 1))
