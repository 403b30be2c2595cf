"""With LYNX, decode steps use fewer experts, requests report it, and exact requests do not change."""

import dataclasses
import json

import pytest
from support.models.engines import GREEDY, engine_of, prompts, serve
from support.models.small import config, decoder

from jmoe.config.moe import MoEConfig
from jmoe.config.techniques import BinningConfig, CapacityConfig
from jmoe.engine.engine import Engine
from jmoe.mesh import make_mesh
from jmoe.server.watch.metrics import Metrics

CFG = config(num_experts=16, num_experts_per_tok=4)
EXACT = dataclasses.replace(GREEDY, exact=True)
STRONG = BinningConfig(bin_width=0.05)


def engine_on(moe: MoEConfig = MoEConfig(), **sizes) -> Engine:
    mesh = make_mesh()
    return engine_of(decoder(CFG, mesh, moe), mesh, **sizes)


def answers(engine: Engine) -> list[list[int]]:
    return [r.token_ids for r in serve(engine, prompts(7))[0]]


@pytest.fixture(scope="module")
def lossless() -> list[list[int]]:
    return answers(engine_on())


@pytest.fixture(scope="module")
def strong() -> Engine:
    return engine_on(MoEConfig(binning=STRONG))


def test_a_width_beyond_every_gap_changes_nothing(lossless: list[list[int]]):
    engine = engine_on(MoEConfig(binning=BinningConfig(bin_width=1e4)))
    assert answers(engine) == lossless
    decode = engine.moe_stats()["decode"]
    assert decode["remapped"] == 0 < decode["assignments"]
    assert decode["active_experts"] == decode["active_experts_baseline"]


def test_decode_touches_fewer_experts_and_every_request_reports_it(strong: Engine, lossless: list[list[int]]):
    before = strong.moe_stats()
    requests, outputs = serve(strong, prompts(7))
    assert [r.token_ids for r in requests] != lossless
    assert [r.token_ids[0] for r in requests] == [ids[0] for ids in lossless], "a prompt is not binned"
    after = strong.moe_stats()
    assert after["prefill"]["remapped"] == after["decode"]["dropped"] == 0
    assert after["decode"]["active_experts"] < 0.8 * after["decode"]["active_experts_baseline"]
    usages = [parts[-1].moe for parts in outputs]
    assert sum(u.remapped for u in usages) == after["decode"]["remapped"] - before["decode"]["remapped"] > 0
    for request, usage in zip(requests, usages, strict=True):
        tokens = request.length - 1  # the last token is not an input
        assert usage.assignments == tokens * CFG.num_hidden_layers * CFG.num_experts_per_tok
        assert usage.dropped == usage.rerouted == 0


def test_metrics_count_what_was_remapped(strong: Engine):
    serve(strong, prompts(3))
    text, stats = Metrics(strong).text().decode(), strong.moe_stats()
    for i, layer in enumerate(stats["decode"]["per_layer"]):
        assert f'jmoe_moe_remapped_assignments_total{{layer="{i}"}} {layer["remapped"]:.1f}' in text
    assert 'jmoe_moe_active_experts{layer="1"}' in text
    assert json.dumps(stats)


@pytest.mark.parametrize("alone", [0, 3])
def test_an_exact_request_is_untouched_by_its_mates(alone: int, strong: Engine, lossless: list[list[int]]):
    params = [EXACT if i == alone else GREEDY for i in range(7)]
    requests, outputs = serve(strong, prompts(7), params)
    assert requests[alone].token_ids == lossless[alone]
    assert outputs[alone][-1].moe.remapped == 0 < sum(parts[-1].moe.remapped for parts in outputs)


def test_a_request_on_its_own_is_as_without_binning(strong: Engine, lossless: list[list[int]]):
    assert serve(strong, prompts(7)[:1])[0][0].token_ids == lossless[0]


@pytest.mark.matrix
@pytest.mark.parametrize("binning", [BinningConfig("oea", k0=1), BinningConfig("random", keep=0.5)])
def test_other_methods_serve(binning: BinningConfig):
    engine = engine_on(MoEConfig(binning=binning), warm_up=True)
    answers(engine)
    decode = engine.moe_stats()["decode"]
    assert decode["active_experts"] < decode["active_experts_baseline"] and decode["remapped"] > 0
    assert engine.runner.compilations.num_after_warmup == 0


@pytest.mark.matrix
def test_binning_comes_before_the_capacity():
    """The limit counts what binning leaves: fewer experts, each fuller, so more is dropped."""
    limit = CapacityConfig(factor=1.0, phase="decode")
    dropped = {}
    for binning in (None, STRONG):
        engine = engine_on(MoEConfig(binning=binning, capacity=limit))
        outputs = serve(engine, prompts(7), [EXACT, *[GREEDY] * 6])[1]
        usages = [parts[-1].moe for parts in outputs]
        assert usages[0].remapped == usages[0].dropped == 0
        stats = engine.moe_stats()["decode"]
        assert stats["dropped"] == sum(u.dropped for u in usages)
        assert stats["remapped"] == sum(u.remapped for u in usages)
        dropped[binning] = stats["dropped"] / (stats["assignments"] + stats["dropped"])
    assert 0 < dropped[None] < dropped[STRONG]


@pytest.mark.parametrize(
    "refused, message",
    [
        (BinningConfig("oea", k0=5), "moe.binning.k0 must be from 1 to the model's 4 experts a token, got 5"),
        (
            BinningConfig("budget", keep=0.2),
            "at most 3.2 of 16 experts, below the 4 of a token; it must be at least 0.25",
        ),
    ],
    ids=["k0", "keep"],
)
def test_what_the_model_is_too_small_for_is_refused(refused: BinningConfig, message: str):
    with pytest.raises(ValueError, match=message):
        engine_on(MoEConfig(binning=refused))


def test_a_dense_model_is_refused():
    dense = config(num_experts=1, num_experts_per_tok=1)
    with pytest.raises(ValueError, match="more experts than a token uses: this model has 1 and uses 1"):
        decoder(dense, make_mesh(), MoEConfig(binning=STRONG))
