"""Tests traces, synthetic loads, clipping, prompts and figures of ``jmoe bench``."""

import json

import numpy as np
import pytest

from jmoe.tools.bench.answers import Result
from jmoe.tools.bench.loads import Clipped, LengthLimits, Load, LoadCall, clip, read_trace, synthetic
from jmoe.tools.bench.measures import peak_concurrency, summary
from jmoe.tools.bench.prompts import PromptSource
from jmoe.tools.bench.replay import Replay
from jmoe.tools.bench.server_info import hit_rate

AZURE = [{"timestamp": 3000, "input_length": 30, "output_length": 4},
         {"timestamp": 1000, "input_length": 10, "output_length": 2}]  # fmt: skip
MOONCAKE = [{"timestamp": 0, "input_length": 1100, "output_length": 8, "hash_ids": [7, 8, 9]},
            {"timestamp": 500, "input_length": 1030, "output_length": 8, "hash_ids": [7, 8, 4]},
            {"timestamp": 900, "input_length": 512, "output_length": 8, "hash_ids": [3]}]  # fmt: skip


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_trace_begins_with_its_first_request(tmp_path):
    load = read_trace(written(tmp_path / "a.jsonl", AZURE), time_scale=0.5)
    assert load.calls == [LoadCall(0.0, 10, 2), LoadCall(1.0, 30, 4)] and load.is_timed


def test_a_trace_at_time_scale_0_is_due_at_once(tmp_path):
    load = read_trace(written(tmp_path / "a.jsonl", AZURE), time_scale=0, max_requests=1)
    assert load.calls == [LoadCall(0.0, 30, 4)] and not load.is_timed


@pytest.mark.parametrize("running", [True, False])
def test_equal_hash_ids_are_equal_prefixes(tmp_path, running):
    load = read_trace(written(tmp_path / "m.jsonl", MOONCAKE))
    source = PromptSource(range(10_000), running, seed=3)
    prompts = [source.prompt(i, call, load.block_size) for i, call in enumerate(load.calls)]
    assert [len(p) for p in prompts] == [1100, 1030, 512]
    assert prompts[0][:1024] == prompts[1][:1024]
    assert prompts[0][1024:1030] != prompts[1][1024:]
    assert prompts[2][:512] != prompts[0][:512]


def test_scaled_lengths_share_as_much_of_their_prompts(tmp_path):
    load = read_trace(written(tmp_path / "m.jsonl", MOONCAKE), length_scale=1 / 32)
    assert load.block_size == 16 and [c.input_length for c in load.calls] == [34, 32, 16]
    source = PromptSource(range(10_000), False, seed=3)
    first, second, _ = (source.prompt(i, call, load.block_size) for i, call in enumerate(load.calls))
    assert first[:32] == second[:32]


@pytest.mark.parametrize("row", [{"timestamp": 1}, [1], {**AZURE[0], "timestamp": -1}])
def test_a_line_that_is_no_request_is_named(tmp_path, row):
    with pytest.raises(ValueError, match="line 2"):
        read_trace(written(tmp_path / "a.jsonl", [AZURE[0], row]))


def test_clipping_is_counted():
    load = Load([LoadCall(0, 100, 10), LoadCall(0, 10, 100), LoadCall(0, 10, 10), LoadCall(0, 40, 40)], False)
    clipped, counts = clip(load, LengthLimits(max_input=50, max_output=40, context=60))
    assert [(c.input_length, c.output_length) for c in clipped.calls] == [
        (50, 10),
        (10, 40),
        (10, 10),
        (20, 40),
    ]
    assert counts == Clipped(input=1, output=1, context=1, input_tokens=70, output_tokens=60)
    assert clip(clipped, LengthLimits(50, 40, 60)) == (clipped, Clipped())


def test_a_prompt_keeps_one_token():
    clipped, counts = clip(Load([LoadCall(0, 5, 90)], False), LengthLimits(context=8))
    assert (clipped.calls[0].input_length, clipped.calls[0].output_length) == (1, 7)
    assert counts.context == 1


def test_poisson_arrivals():
    times = np.array([c.due_time for c in synthetic(20_000, 1, 1, rate=50, burstiness=1, seed=0).calls])
    gaps = np.diff(times)
    assert times[0] == 0 and np.all(gaps >= 0)
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.03)  # the deviation of an exponential is its mean


def test_burstier_arrivals_have_the_same_rate():
    gaps = np.diff([c.due_time for c in synthetic(20_000, 1, 1, rate=50, burstiness=0.25, seed=0).calls])
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.std() == pytest.approx(2 / 50, rel=0.1)


def result(sent, ttft, gaps, **more):
    first = sent + ttft
    return Result(sent, first, first + sum(gaps), gaps, 10, len(gaps) + 1, True, **more)


def test_figures_are_numpys():
    rng = np.random.default_rng(0)
    results = [result(i * 0.1, rng.random(), rng.random(9).tolist(), lag=i / 1e3) for i in range(50)]
    failed = Result(0.0, end_time=0.1, cause="HTTP 500: x")
    report = summary(Replay([*results, failed], 20.0, 1.0))
    ttft = [(r.first_token_time - r.send_time) * 1e3 for r in results]
    itl = [g * 1e3 for r in results for g in r.gaps]
    tpot = [np.mean(r.gaps) * 1e3 for r in results]
    for name, values in (("ttft", ttft), ("itl", itl), ("tpot", tpot)):
        assert report[f"mean_{name}_ms"] == pytest.approx(np.mean(values))
        assert report[f"median_{name}_ms"] == pytest.approx(np.median(values))
        assert report[f"p99_{name}_ms"] == pytest.approx(np.percentile(values, 99))
    assert (report["completed"], report["failed"]) == (50, 1)
    assert report["failures"] == {"HTTP 500: x": 1}
    assert report["output_throughput"] == 500 / 20 and report["total_token_throughput"] == 1000 / 20
    assert report["lag"]["max_ms"] == pytest.approx(49) and report["client_cpu_share"] == 0.05


def test_goodput_wants_every_limit_kept():
    results = [result(0, 0.1, [0.01]), result(0, 0.1, [0.5]), result(0, 0.9, [0.01])]
    report = summary(Replay(results, 2.0, 0.0), {"ttft": 500, "tpot": 50})
    assert report["request_goodput"] == 0.5
    assert summary(Replay(results, 2.0, 0.0))["request_goodput"] is None


def test_peak_concurrency_does_not_count_one_that_just_ended():
    spans = [(0.0, 2.0), (1.0, 3.0), (2.0, 4.0), (1.5, 1.6)]
    assert peak_concurrency([Result(a, end_time=b) for a, b in spans]) == 3
    assert peak_concurrency([Result(a, end_time=b) for a, b in [(0.0, 1.0), (1.0, 2.0)]]) == 1


def test_lossy_shares_are_of_all_assignments():
    moe = [
        {"assignments": 30, "remapped": 3, "dropped": 0, "rerouted": 1},
        {"assignments": 10, "remapped": 1},
    ]
    report = summary(Replay([result(0, 0.1, [0.1], moe=m) for m in moe], 1.0, 0.0))
    assert report["moe"]["remapped"] == 4 and report["moe"]["remapped_share"] == 0.1
    assert report["moe"]["rerouted_share"] == 0.025 and report["moe"]["dropped_share"] == 0


def test_the_hit_rate_is_of_the_run():
    assert hit_rate({"queries": 10.0, "hits": 9.0}, {"queries": 30.0, "hits": 14.0}) == 0.25
    assert hit_rate({"queries": 10.0, "hits": 9.0}, {"queries": 10.0, "hits": 9.0}) is None
    assert hit_rate(None, {"queries": 1.0, "hits": 0.0}) is None
