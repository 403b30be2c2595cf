"""Lists of modules are read in every spelling in which checkpoints write them."""

import pytest

from jmoe.checkpoint.quantised.methods.patterns import Whole, matcher, patterns, runs

GATE, EXPERT = "model.layers.3.mlp.gate", "model.layers.3.mlp.experts.17.gate_proj"
Q_PROJ, SHARED = "model.layers.3.self_attn.q_proj", "model.layers.3.mlp.shared_experts.up_proj"
LAYER_30, HEAD, EMBED = "model.layers.30.self_attn.q_proj", "lm_head", "model.embed_tokens"
ALL = (GATE, EXPERT, Q_PROJ, SHARED, LAYER_30, HEAD, EMBED)


@pytest.mark.parametrize(
    ("entry", "matched"),
    [
        ("lm_head", (HEAD,)),
        ("language_model.lm_head", (HEAD,)),
        ("model.embed_tokens", (EMBED,)),
        ("embed_tokens", (EMBED,)),
        (GATE, (GATE,)),
        ("gate", (GATE,)),
        ("mlp.gate", (GATE,)),
        ("language_model.model.layers.3.mlp.gate", (GATE,)),
        ("model.language_model.layers.3.mlp.gate", (GATE,)),
        ("layers.3.mlp.gate", (GATE,)),
        ("self_attn", (Q_PROJ, LAYER_30)),
        ("model.layers.3", (GATE, EXPERT, Q_PROJ, SHARED)),
        ("model.layers.3.self_attn", (Q_PROJ,)),
        ("model.layers.3.mlp.experts", (EXPERT,)),
        ("model.layers.3.mlp.experts.1", ()),
        ("model.layers.3.mlp.gat", ()),
        ("ayers.3.mlp.gate", ()),
        ("visual.layers.3.mlp.gate", ()),
        ("model.layers.*.mlp.gate", (GATE,)),
        ("model.layers.*.self_attn", (Q_PROJ, LAYER_30)),
        ("model.layers.3.self_attn*", (Q_PROJ,)),
        ("model.language_model.layers.*.mlp.gate*", (GATE,)),
        ("language_model.model.layers.3*", (GATE, EXPERT, Q_PROJ, SHARED, LAYER_30)),
        ("*.self_attn.*", (Q_PROJ, LAYER_30)),
        ("*lm_head*", (HEAD,)),
        ("re:.*mlp.gate$", (GATE,)),
        ("re:.*lm_head", (HEAD,)),
        ("re:lm_head", (HEAD,)),
        ("re:.*self_attn.*", (Q_PROJ, LAYER_30)),
        ("re:.*shared_experts.*", (SHARED,)),
        ("re:self_attn", ()),  # a pattern is about the beginning of a name
        (r"re:.*mlp\.(gate|up|gate_up|down)_proj.*", ()),
        (r"re:.*experts\.\d+\.(gate|up|down)_proj$", (EXPERT,)),
        ("re:model.layers.3.*q_proj", (Q_PROJ, LAYER_30)),
        ("re:language_model.model.layers.3[.].*", (GATE, EXPERT, Q_PROJ, SHARED)),
        ("re:model.language_model.layers.3[.].*", (GATE, EXPERT, Q_PROJ, SHARED)),
        ("re:vision_tower.*", ()),
    ],
)
def test_an_entry_matches_modules(entry, matched):
    matches = matcher(entry)
    assert tuple(module for module in ALL if matches(module)) == matched
    # a module of a wrapped model is the same module
    for wrapped in ("language_model.", "model.language_model."):
        names = (wrapped + module.removeprefix("model." * ("model." in wrapped)) for module in ALL)
        assert tuple(m for m, name in zip(ALL, names, strict=True) if matches(name)) == matched


def test_a_name_is_one_of_the_runs_of_what_it_matches():
    for entry in ("layers.3", "gate", "model.layers.3.mlp.gate", "3.mlp", "layers"):
        for module in ALL:
            assert Whole(entry)(module) == (entry in set(runs(module)))


def test_an_expression_that_is_none():
    with pytest.raises(ValueError, match=r"'re:\(' is not a regular expression: .*"):
        matcher("re:(")


@pytest.mark.parametrize("wrong", ["lm_head", 5, {"lm_head": None}, ["lm_head", 3], [None], [""]])
def test_a_list_that_is_none(wrong):
    assert patterns({}, "ignore") == patterns({"ignore": None}, "ignore") == ()
    with pytest.raises(ValueError, match="ignore must be a list of names of modules, got "):
        patterns({"ignore": wrong}, "ignore")
