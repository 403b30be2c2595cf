"""Models under a placement give the same logits, tokens and counts. What does not fit is refused."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from support.models import hf_tiny
from support.models.routed import planted

from jmoe import LLM, MoEConfig, SamplingParams
from jmoe.checkpoint import convert, load_model, read_config
from jmoe.checkpoint.identity import model_identity
from jmoe.config.techniques import ShuffleConfig
from jmoe.engine.deployment.settings import EngineSettings
from jmoe.mesh import make_mesh
from jmoe.placement.group import group
from jmoe.placement.placement import Placement, balance

LAYERS, EXPERTS = 2, 8
SIZES = {"dtype": "float32", "max_num_seqs": 2, "max_num_batched_tokens": 64, "warm_up": False}
PROMPT = [5, 17, 80, 3, 44, 9]


def one_device():
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Returns the folder of ``hf`` and ``out``, one model in both forms, and ``other`` with other weights."""
    root = tmp_path_factory.mktemp("models")
    hf_tiny.write_checkpoint(root / "hf", hf_tiny.hf_config(), shards=2)
    convert(root / "hf", root / "out")
    config = hf_tiny.hf_config()
    hf_tiny.write_checkpoint(root / "other", config, tensors=hf_tiny.random_tensors(config, seed=1))
    return root


def shuffled(model: Path, ranks: int, seed: int = 0) -> Placement:
    rows = np.random.default_rng(seed).permuted(np.tile(np.arange(EXPERTS), (LAYERS, 1)), axis=1)
    return Placement(rows, ranks, model_identity(load_model(model, one_device())))


def renumbering(path: Path) -> MoEConfig:
    return MoEConfig(shuffle=ShuffleConfig(str(path), tokens=False))


@pytest.mark.parametrize(("form", "ranks"), [("hf", 4), pytest.param("out", 1, marks=pytest.mark.matrix)])
def test_renumbering_changes_no_logit_and_no_token(models: Path, tmp_path: Path, form: str, ranks: int):
    path = tmp_path / "placement.npz"
    shuffled(models / "hf", ranks).save(path)
    results = []
    for moe in (None, renumbering(path)):
        with LLM(models / form, moe=moe, expert_parallel_size=ranks, **SIZES) as llm:
            logits = llm.logits(PROMPT)
            tokens = llm.generate([PROMPT], SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))
            results.append((logits, tokens[0].outputs[0].token_ids, llm.engine.moe_stats()))
    (plain, tokens, stats), (renumbered, same_tokens, same_stats) = results
    np.testing.assert_allclose(renumbered, plain, atol=1e-5)
    assert same_tokens == tokens
    for phase in ("prefill", "decode"):
        assert same_stats[phase]["counts"] == stats[phase]["counts"], "by the checkpoint's ids"


@pytest.mark.parametrize("architecture", hf_tiny.FAMILIES)
def test_gates_and_experts_move_together_in_every_family(tmp_path: Path, architecture: str):
    hf_tiny.write_checkpoint(tmp_path, hf_tiny.hf_config(architecture))
    plain = load_model(tmp_path, one_device())
    placement = shuffled(tmp_path, 2)
    moved = load_model(tmp_path, one_device(), placement=placement)
    for i, (before, after) in enumerate(zip(plain.layers, moved.layers, strict=True)):
        row = placement.experts_LP[i]
        for name in ("router.gate_ED", "experts.gate_up_E2FD", "experts.down_EDF"):
            here, there = before.moe, after.moe
            for part in name.split("."):
                here, there = getattr(here, part), getattr(there, part)
            np.testing.assert_array_equal(np.asarray(there[...]), np.asarray(here[...])[row], err_msg=name)
        np.testing.assert_array_equal(
            np.asarray(before.attention.q_proj[...]), np.asarray(after.attention.q_proj[...])
        )


def test_both_forms_load_alike_under_a_placement_on_a_mesh(models: Path):
    placement = shuffled(models / "hf", 4)
    mesh = make_mesh(expert=4, tensor=2, devices=jax.devices()[:8])
    forms = [load_model(models / form, mesh, placement=placement) for form in ("hf", "out")]
    for one, other in zip(*(jax.tree.leaves(nnx.state(m)) for m in forms), strict=True):
        assert one.sharding == other.sharding
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_the_identity_is_the_models_in_every_form(models: Path, tmp_path: Path):
    plain = load_model(models / "hf", one_device())
    identity = model_identity(plain)
    assert identity.startswith("Qwen3MoeForCausalLM:")
    assert model_identity(load_model(models / "out", one_device())) == identity
    assert model_identity(load_model(models / "hf", one_device(), dtype="bfloat16")) == identity
    placement = shuffled(models / "hf", 2)
    moved = load_model(models / "hf", one_device(), placement=placement)
    assert model_identity(moved, placement) == identity != model_identity(moved)
    assert model_identity(load_model(models / "other", one_device())) != identity
    wider = hf_tiny.hf_config(rope_parameters={"rope_type": "default", "rope_theta": 7000.0})
    hf_tiny.write_checkpoint(tmp_path, wider)
    assert model_identity(load_model(tmp_path, one_device())) != identity, "another configuration"


def test_the_placement_of_another_model_is_refused(models: Path):
    placement = shuffled(models / "hf", 2)
    with pytest.raises(ValueError, match="the placement is for another model or mesh: model Qwen3"):
        load_model(models / "other", one_device(), placement=placement)
    short = Placement(placement.experts_LP[:1], 2, placement.model)
    with pytest.raises(ValueError, match="MoE layers 1, here 2"):
        load_model(models / "hf", one_device(), placement=short)
    replicated = balance(np.ones((LAYERS, EXPERTS)), slots=12, ranks=2, model=placement.model)
    with pytest.raises(ValueError, match="has replicas of experts"):
        load_model(models / "hf", one_device(), placement=replicated)


def test_engines_refuse_what_does_not_fit_the_placement(models: Path, tmp_path: Path):
    path = tmp_path / "placement.npz"
    with pytest.raises(ValueError, match=r"cannot read the placement .*placement\.npz"):
        LLM(models / "hf", moe=renumbering(path), **SIZES)
    shuffled(models / "hf", 4).save(path)
    with pytest.raises(ValueError, match="ranks 4, here 2"):
        LLM(models / "hf", moe=renumbering(path), expert_parallel_size=2, **SIZES)
    with pytest.raises(ValueError, match="has no token tables"):
        moe = MoEConfig(shuffle=ShuffleConfig(str(path)))
        LLM(models / "hf", moe=moe, expert_parallel_size=4, attention="tp", **SIZES)


def test_the_engine_has_the_tables(models: Path, tmp_path: Path):
    made, _ = planted(EXPERTS, 2)
    layers = {"together_LEE": made.together_LEE[:LAYERS], "following_LEE": made.following_LEE[: LAYERS - 1]}
    sample = dataclasses.replace(
        made.sample,
        experts_QLE=made.sample.experts_QLE[:, :LAYERS],
        gates_QLE=made.sample.gates_QLE[:, :LAYERS],
        maps_QMLE=made.sample.maps_QMLE[:, :, :LAYERS],
        ids_QPLK=made.sample.ids_QPLK[:, :, :LAYERS],
        weights_QPLK=made.sample.weights_QPLK[:, :, :LAYERS],
    )
    kept = made.pairs_X < LAYERS * made.vocab * EXPERTS
    pairs = {"pairs_X": made.pairs_X[kept], "counts_X": made.counts_X[kept]}
    model = model_identity(load_model(models / "hf", one_device()))
    profile = dataclasses.replace(made, model=model, sample=sample, **layers, **pairs)
    placement = group(profile, ranks=2)

    def save(vocab: int) -> None:
        """Saves the placement with the tables of the first ids. More ids repeat the last one."""
        ids = np.minimum(np.arange(vocab), made.vocab - 1)
        by_id = {n: getattr(placement.tables, n)[:, ids] for n in ("ranks_LV", "confidence_LV", "shares_LVR")}
        tables = dataclasses.replace(placement.tables, **by_id)
        dataclasses.replace(placement, tables=tables).save(tmp_path / "p.npz")

    moe = MoEConfig(shuffle=ShuffleConfig(str(tmp_path / "p.npz"), tokens=False, requests=True))
    vocab = read_config(models / "hf").vocab_size
    save(vocab)
    with LLM(models / "hf", moe=moe, expert_parallel_size=2, **SIZES) as llm:
        loaded = llm.engine.placement
        assert loaded is not None and loaded.tables is not None
        assert loaded.tables.ranks_LV.shape == (LAYERS, vocab)
    for other in (5, vocab - 1, vocab + 1):
        save(other)
        with pytest.raises(ValueError, match=f"has tables of {other} token ids, the model has {vocab}: make"):
            LLM(models / "hf", moe=moe, expert_parallel_size=2, **SIZES)


def test_the_settings_say_what_each_part_needs():
    text = '{"shuffle": {"placement": "p.npz"}}'
    assert MoEConfig.from_text(text).shuffle == ShuffleConfig("p.npz", tokens=True, requests=False)
    for shuffle, attention, message in (
        ({}, "dp", "moe.shuffle.tokens = true needs attention 'tp', got 'dp'"),
        ({"tokens": False, "requests": True}, "tp", "shuffle.requests = true needs attention 'dp', got 'tp'"),
    ):
        moe = MoEConfig.from_dict({"shuffle": {"placement": "p.npz", **shuffle}})
        with pytest.raises(ValueError, match=message):
            EngineSettings(moe=moe, attention=attention)
    EngineSettings(moe=MoEConfig.from_text(text), attention="tp")
    EngineSettings(moe=MoEConfig(shuffle=ShuffleConfig("p.npz", tokens=False)))
    for values, message in (
        ({"placement": ""}, "moe.shuffle.placement must name a file"),
        ({"placement": 3}, "moe.shuffle.placement must be text, got 3"),
        ({"placement": "p", "tokens": 1}, "moe.shuffle.tokens must be true or false, got 1"),
        ({"placement": "p", "token": True}, "unknown key 'token'; nearest known key: 'tokens'"),
        ({"tokens": True}, "moe.shuffle.placement"),
    ):
        with pytest.raises(ValueError, match=message):
            MoEConfig.from_dict({"shuffle": values})
