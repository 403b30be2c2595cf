"""Tests capacity in the engine: which requests lose assignments, and the reports of them."""

import dataclasses

import pytest
from support.models.engines import CFG, GREEDY, engine_on, prompts, serve
from support.models.small import mesh_of

from jmoe.config.moe import MoEConfig
from jmoe.config.techniques import CapacityConfig
from jmoe.engine.engine import Engine
from jmoe.mesh import make_mesh

EXACT = dataclasses.replace(GREEDY, exact=True)
HARSH = CapacityConfig(factor=0.5, phase="both")


def answers(engine: Engine, params=GREEDY, count: int = 7) -> list[list[int]]:
    return [r.token_ids for r in serve(engine, prompts(count), params)[0]]


@pytest.fixture(scope="module")
def lossless() -> list[list[int]]:
    return answers(engine_on(make_mesh()))


@pytest.fixture(scope="module")
def harsh() -> Engine:
    return engine_on(make_mesh(), MoEConfig(capacity=HARSH), warm_up=True)


def test_a_wide_limit_changes_nothing(lossless: list[list[int]]):
    wide = CapacityConfig(factor=CFG.num_experts / CFG.num_experts_per_tok, phase="both")
    engine = engine_on(make_mesh(), MoEConfig(capacity=wide))
    assert answers(engine) == lossless
    stats = engine.moe_stats()
    assert all(stats[phase]["dropped"] == 0 < stats[phase]["assignments"] for phase in ("prefill", "decode"))


def test_a_harsh_limit_drops_and_tells_every_request(harsh: Engine, lossless: list[list[int]]):
    before = harsh.moe_stats()
    requests, outputs = serve(harsh, prompts(7))
    assert [r.token_ids for r in requests] != lossless
    after = harsh.moe_stats()
    dropped = sum(after[p]["dropped"] - before[p]["dropped"] for p in ("prefill", "decode"))
    computed = sum(after[p]["assignments"] - before[p]["assignments"] for p in ("prefill", "decode"))
    usages = [parts[-1].moe for parts in outputs]
    assert sum(u.dropped for u in usages) == dropped > 0
    assert sum(u.assignments for u in usages) == computed + dropped
    for request, usage in zip(requests, usages, strict=True):
        tokens = request.length - 1  # the last token is not an input
        assert usage.assignments == tokens * CFG.num_hidden_layers * CFG.num_experts_per_tok
        assert usage.rerouted == usage.remapped == 0


def test_an_exact_request_is_untouched_by_its_mates(harsh: Engine, lossless: list[list[int]]):
    for alone in range(7):
        params = [EXACT if i == alone else GREEDY for i in range(7)]
        requests, outputs = serve(harsh, prompts(7), params)
        assert requests[alone].token_ids == lossless[alone]
        assert outputs[alone][-1].moe.dropped == 0 < sum(parts[-1].moe.dropped for parts in outputs)


def test_the_factor_changes_without_compiling(harsh: Engine, lossless: list[list[int]]):
    compiled = harsh.runner.compilations.num_after_warmup
    harsh.runner.knobs["capacity.factor"] = float(CFG.num_experts)
    assert answers(harsh) == lossless
    harsh.runner.knobs["capacity.factor"] = HARSH.factor
    assert answers(harsh) != lossless and harsh.runner.compilations.num_after_warmup == compiled


@pytest.mark.matrix
@pytest.mark.parametrize(("policy", "scope"), [("reroute", "expert"), ("expand", "device")])
def test_ranks_limit_their_own_tokens(policy: str, scope: str, lossless: list[list[int]]):
    capacity = CapacityConfig(factor=0.6, policy=policy, scope=scope, phase="both")
    engine = engine_on(mesh_of((1, 4, 1)), MoEConfig(capacity=capacity, transport="ragged_all_to_all"))
    requests, outputs = serve(engine, prompts(7), [EXACT, *[GREEDY] * 6])
    assert requests[0].token_ids == lossless[0] and outputs[0][-1].moe.dropped == 0
    usage = [parts[-1].moe for parts in outputs[1:]]
    assert sum(u.dropped for u in usage) > 0
    assert (sum(u.rerouted for u in usage) > 0) == (policy == "reroute")


def test_only_the_configured_phase_is_limited():
    engine = engine_on(make_mesh(), MoEConfig(capacity=dataclasses.replace(HARSH, phase="decode")))
    serve(engine, prompts(7))
    stats = engine.moe_stats()
    assert stats["prefill"]["dropped"] == 0 < stats["decode"]["dropped"]
    assert stats["decode"]["active_experts"] <= stats["decode"]["active_experts_baseline"]


@pytest.mark.parametrize("refused", [{"policy": "expand"}, {"scope": "device"}])
def test_a_limit_that_needs_several_devices_is_refused_on_one(refused: dict):
    with pytest.raises(ValueError, match="an expert parallel size of 2 or more, got 1"):
        engine_on(make_mesh(), MoEConfig(capacity=CapacityConfig(**refused)))
