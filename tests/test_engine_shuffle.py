"""Speculative MoE in the engine: the same tokens on every mesh, whatever was guessed."""

import dataclasses
from pathlib import Path

import hf_tiny
import numpy as np
import pytest

from jmoe import LLM, MoEConfig, SamplingParams
from jmoe.checkpoint import load_model
from jmoe.checkpoint.identity import model_identity
from jmoe.mesh import make_mesh
from jmoe.moe.placement import Placement
from jmoe.moe.orders import prompt_share, step_tables
from jmoe.moe.tables import Tables
from jmoe.techniques import BinningConfig, ShuffleConfig

LAYERS, EXPERTS, VOCAB = 3, 8, 96
PROMPTS = [[5, 17, 80, 3], [44, 9, 2, 61, 70, 71, 8, 1, 12], [90], [33, 34, 35]]
GREEDY = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)


def tables_of(ranks: int, *, whole: bool = True) -> Tables:
    """Guesses at random."""
    rng = np.random.default_rng(ranks)

    def shares(count: int) -> tuple[np.ndarray, ...]:
        share = rng.dirichlet(np.ones(ranks), (LAYERS, count)).astype(np.float16)
        return share.argmax(-1).astype(np.int16), share.max(-1), share if whole else None

    return Tables(*shares(VOCAB), *shares(ranks * ranks))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    config = hf_tiny.hf_config() | {"num_hidden_layers": LAYERS, "vocab_size": VOCAB}
    hf_tiny.write_checkpoint(directory, config)
    return directory


@pytest.fixture(scope="module")
def placed(model: Path):
    """The file of a random placement on ``ranks``, made once each."""
    identity, made = model_identity(load_model(model, make_mesh())), {}

    def path(ranks: int) -> str:
        if ranks not in made:
            rows = np.random.default_rng(7).permuted(np.tile(np.arange(EXPERTS), (LAYERS, 1)), axis=1)
            made[ranks] = model / f"placement{ranks}.npz"
            Placement(rows, ranks, identity, tables_of(ranks)).save(made[ranks])
        return str(made[ranks])

    return path


def answers(model: Path, shape: tuple[int, int, int], moe: MoEConfig | None, **options):
    sizes = {"dtype": "float32", "max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 64}
    mesh = dict(zip(("data", "expert", "tensor"), shape, strict=True))
    mesh = {f"{axis}_parallel_size": size for axis, size in mesh.items()}
    with LLM(model, moe=moe, **sizes, **mesh, **options) as llm:
        outputs = llm.generate(PROMPTS, GREEDY)
        return [o.outputs[0].token_ids for o in outputs], llm.engine.moe_stats(), [o.moe for o in outputs]


@pytest.fixture(scope="module")
def plain(model: Path):
    return answers(model, (1, 1, 1), None)


@pytest.mark.parametrize(
    ("shape", "transport", "history"),
    [((1, 4, 1), "ragged_all_to_all", True), ((2, 2, 2), "replicated", False)],
    ids=str,
)
def test_shuffled_tokens_get_the_same_answers(model, placed, plain, shape, transport: str, history: bool):
    shuffle = ShuffleConfig(placed(shape[1]), history=history)
    moe = MoEConfig(transport=transport, shuffle=shuffle)
    tokens, stats, _ = answers(model, shape, moe, attention="tp")
    assert tokens == plain[0]
    for phase in ("prefill", "decode"):
        assert stats[phase]["counts"] == plain[1][phase]["counts"], "by the checkpoint's ids"
        assert stats[phase]["dropped"] == 0 < stats[phase]["remote_assignments"]


def test_scheduled_requests_get_the_same_answers(model: Path, placed, plain):
    shuffle = ShuffleConfig(placed(4), tokens=False, requests=True)
    tokens, stats, _ = answers(model, (1, 4, 1), MoEConfig(shuffle=shuffle))
    assert tokens == plain[0] and stats["decode"]["counts"] == plain[1]["decode"]["counts"]


def test_shuffling_goes_with_binning_and_tells_every_request(model: Path, placed):
    """Rows are in another order in the layer; what is counted must come back to its own request."""
    binning = BinningConfig(bin_width=0.05)
    alone = answers(model, (1, 4, 1), MoEConfig(binning=binning), attention="tp")
    moe = MoEConfig(binning=binning, shuffle=ShuffleConfig(placed(4)))
    tokens, stats, usage = answers(model, (1, 4, 1), moe, attention="tp")
    assert tokens == alone[0] and usage == alone[2]
    assert stats["decode"]["remapped"] == sum(u.remapped for u in usage) > 0


def test_tables_become_shares_of_255():
    tables = tables_of(4)
    by_token = step_tables(tables, history=False)
    assert all(t.by_history_HR is None and t.by_token_VR.dtype == np.uint8 for t in by_token)
    np.testing.assert_allclose(by_token[1].by_token_VR / 255, tables.shares_LVR[1], atol=1 / 255)
    both = step_tables(tables, history=True)
    np.testing.assert_allclose(both[2].by_history_HR / 255, tables.next_shares_LHR[2], atol=1 / 255)
    [only, *_] = step_tables(tables_of(4, whole=False), history=True)
    best = np.sort(only.by_token_VR, axis=1)
    assert (best[:, :-1] == 0).all() and (best[:, -1] > 0).all()


def test_a_prompts_share_is_the_mean_over_its_tokens_and_all_layers():
    tables = tables_of(2)
    share = prompt_share(tables, groups=2)([3, 3, 50])
    want = np.mean([tables.shares_LVR[:, t].astype(np.float32).mean(0) for t in (3, 3, 50)], 0)
    np.testing.assert_allclose(share, [*want, *want], atol=1 / 255)


@pytest.mark.parametrize(
    ("options", "attention", "message"),
    [
        ({}, "dp", "moe.shuffle.tokens = true needs attention 'tp', got 'dp'"),
        ({"tokens": False, "requests": True}, "tp", "moe.shuffle.requests = true needs attention 'dp'"),
        ({"tokens": False, "history": True}, "dp", "history = true has no effect without moe.shuffle.tokens"),
    ],
    ids=str,
)
def test_what_the_mesh_leaves_no_room_for_is_refused(model, placed, options, attention: str, message: str):
    with pytest.raises(ValueError, match=message):
        moe = MoEConfig(shuffle=ShuffleConfig(placed(4), **options))
        answers(model, (1, 4, 1), dataclasses.replace(moe), attention=attention)
