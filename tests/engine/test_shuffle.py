"""With Speculative MoE, every mesh gives the same tokens, whatever was guessed."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from support.models import hf_tiny

from jmoe import LLM, MoEConfig, SamplingParams
from jmoe.checkpoint.identity import model_identity
from jmoe.config.techniques import BinningConfig, ShuffleConfig
from jmoe.moe.orders import prompt_share, step_tables
from jmoe.placement.group import group
from jmoe.placement.placement import Placement
from jmoe.placement.profile import Profile
from jmoe.placement.profile_builder import ProfileBuilder, nearest_seen
from jmoe.placement.tables import Tables
from jmoe.tools.profile import routed

LAYERS, EXPERTS, VOCAB = 3, 8, 96
HEADS = 8  # as many heads as the widest mesh has ranks
PROMPTS = [[5, 17, 80, 3], [44, 9, 2, 61, 70, 71, 8, 1, 12], [90], [33, 34, 35]]
GREEDY = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)


def tables_of(ranks: int, *, whole: bool = True) -> Tables:
    """Returns random guesses."""
    rng = np.random.default_rng(ranks)

    def shares(count: int) -> tuple[np.ndarray, ...]:
        share = rng.dirichlet(np.ones(ranks), (LAYERS, count)).astype(np.float16)
        return share.argmax(-1).astype(np.int16), share.max(-1), share if whole else None

    return Tables(*shares(VOCAB), *shares(ranks * ranks))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    config = hf_tiny.hf_config() | {
        "num_hidden_layers": LAYERS, "vocab_size": VOCAB, "num_attention_heads": HEADS,
    }  # fmt: skip
    hf_tiny.write_checkpoint(directory, config)
    return directory


@pytest.fixture(scope="module")
def profile(model: Path) -> Profile:
    """Profiles random text with the model itself."""
    builder = ProfileBuilder(layers=LAYERS, experts=EXPERTS, k=2, vocab=VOCAB)
    windows = np.random.default_rng(3).integers(0, VOCAB, (8, 32)).tolist()
    with LLM(model, max_num_seqs=8, max_model_len=64, dtype="float32", warm_up=False) as llm:
        runner = llm.engine.runner
        for request in routed(runner, iter(windows), 8):
            builder.add(request)
        embeddings_VD = np.asarray(runner.model.embed[...])
        return builder.finish(model_identity(runner.model), nearest_seen(embeddings_VD, builder.seen_V))


@pytest.fixture(scope="module")
def placed(model: Path, profile: Profile):
    """Writes a placement: by a method, or at random with guesses that have nothing to do with it.

    Meshes with as many ranks share one file, so that engines share compiled programs.
    """

    def path(ranks: int, method: str | None = None) -> str:
        rows = np.random.default_rng(7).permuted(np.tile(np.arange(EXPERTS), (LAYERS, 1)), axis=1)
        wild = Placement(rows, ranks, profile.model, tables_of(ranks))
        file = model / f"placement{ranks}.npz"
        (wild if method is None else group(profile, ranks=ranks, method=method)).save(file)
        return str(file)

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


def check_counts(stats, plain) -> None:
    """Compares counts by the checkpoint's expert ids, over all steps.

    The kind of step in which a token is decoded depends on the ranks.
    """
    counted, want = (np.add(s["prefill"]["counts"], s["decode"]["counts"]) for s in (stats, plain))
    np.testing.assert_array_equal(counted, want)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("shape", "method", "transport", "history"),
    [
        ((1, 4, 1), None, "ragged_all_to_all", True),  # a grouping may be any: test_group.py has every method
        ((1, 8, 1), "alternating", "ragged_all_to_all", True),
        ((2, 4, 1), "exflow", "ragged_all_to_all", True),
        ((2, 2, 2), "cross_entropy", "ragged_all_to_all", True),
        ((2, 2, 2), None, "replicated", False),
    ],
    ids=str,
)
def test_shuffled_tokens_get_the_same_answers(
    model, placed, plain, shape, method: str | None, transport, history: bool
):
    shuffle = ShuffleConfig(placed(shape[1], method), history=history)
    moe = MoEConfig(transport=transport, shuffle=shuffle)
    tokens, stats, _ = answers(model, shape, moe, attention="tp")
    assert tokens == plain[0]
    check_counts(stats, plain[1])
    for phase in ("prefill", "decode"):
        assert stats[phase]["dropped"] == 0 < stats[phase]["remote_assignments"]


@pytest.mark.parametrize(
    ("shape", "method"),
    [((1, 4, 1), None), pytest.param((2, 2, 2), "alternating", marks=pytest.mark.matrix)],
    ids=str,
)
def test_scheduled_requests_get_the_same_answers(model: Path, placed, plain, shape, method: str | None):
    shuffle = ShuffleConfig(placed(shape[1], method), tokens=False, requests=True)
    tokens, stats, _ = answers(model, shape, MoEConfig(shuffle=shuffle))
    assert tokens == plain[0]
    check_counts(stats, plain[1])


@pytest.mark.matrix
def test_shuffling_goes_with_binning_and_tells_every_request(model: Path, placed):
    """Rows are in another order in the layer; what is counted must still reach its own request."""
    binning = BinningConfig(bin_width=0.05)
    alone = answers(model, (1, 4, 1), MoEConfig(binning=binning), attention="tp")
    moe = MoEConfig(binning=binning, shuffle=ShuffleConfig(placed(4)))
    tokens, stats, usage = answers(model, (1, 4, 1), moe, attention="tp")
    assert tokens == alone[0] and usage == alone[2]
    assert stats["decode"]["remapped"] == sum(u.remapped for u in usage) > 0


def test_tables_become_shares_of_255():
    tables = tables_of(4)
    by_token = step_tables(tables, history=False)
    assert all(t.history_shares_HR is None and t.token_shares_VR.dtype == np.uint8 for t in by_token)
    np.testing.assert_allclose(by_token[1].token_shares_VR / 255, tables.shares_LVR[1], atol=1 / 255)
    both = step_tables(tables, history=True)
    np.testing.assert_allclose(both[2].history_shares_HR / 255, tables.next_shares_LHR[2], atol=1 / 255)
    [only, *_] = step_tables(tables_of(4, whole=False), history=True)
    best = np.sort(only.token_shares_VR, axis=1)
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
