"""Tests the dashboard's reports, and which listeners share them."""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import threading

import httpx
import numpy as np
import pytest
from support.server.counting_engine import LAYERS, RANKS, CountingEngine, made_up
from support.server.fake_engine import ByteCodec, FakeEngine, eventually, listening, served

from jmoe.engine.reports import EngineSnapshot
from jmoe.server.routes import dashboard
from jmoe.server.watch import poll
from jmoe.server.watch.snapshots import SUMS, take_snapshot, window_report
from jmoe.server.watch.totals import TimeHistogram, Totals, percentile


def sample(stats: dict, live: Totals | None = None, **snapshot):
    numbers = {"num_running": 1, "num_waiting": 2, "kv_usage": 0.5, "is_alive": True}
    numbers |= {"compilations_after_warmup": 0, **snapshot}
    return take_snapshot(EngineSnapshot(**numbers), stats, live or Totals())


# ---- numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 0.95, 0.99])
def test_percentiles_are_right_within_a_bucket(share):
    times = np.random.default_rng(0).lognormal(-4, 2, 5000)
    seconds = TimeHistogram()
    for t in times:
        seconds.add(t)
    exact = np.quantile(times, share)
    assert percentile(np.array(seconds.counts), share) == pytest.approx(exact, rel=0.1)
    assert percentile(np.zeros(5), share) is None


def test_times_out_of_range_go_to_the_outer_buckets():
    seconds = TimeHistogram()
    for t in (-1.0, 0.0, 1e9):
        seconds.add(t)
    assert seconds.counts[0] == 2 and seconds.counts[-1] == 1


@pytest.mark.parametrize("phase", ["all", "prefill", "decode"])
def test_a_report_is_the_difference_of_two_samples(phase):
    before, after = (made_up(np.random.default_rng(1), times) for times in (1, 4))
    moe = window_report(sample(before), sample(after), phase)["moe"]
    phases = ("prefill", "decode") if phase == "all" else (phase,)
    steps = sum(3 * before[p]["steps"] for p in phases)
    counts = sum(3 * np.array(before[p]["counts"]) for p in phases)
    assert moe["steps"] == steps and moe["counts"] == counts.tolist()
    ranks = counts.reshape(LAYERS, RANKS, -1).sum((0, 2))
    assert moe["rank_load"] == ranks.tolist() and moe["rank_of_expert"] is None
    assert moe["rank_max_over_mean"] == pytest.approx(ranks.max() / ranks.mean(), abs=1e-4)
    for i, layer in enumerate(moe["per_layer"]):
        assert layer["layer"] == i + 1
        for name in SUMS:
            assert layer[name] == sum(3 * before[p]["per_layer"][i][name] for p in phases)
        active = sum(3 * before[p]["per_layer"][i]["active_experts"] * before[p]["steps"] for p in phases)
        assert layer["active_experts"] == pytest.approx(active / steps)
    assert moe["dropped"] == sum(layer["dropped"] for layer in moe["per_layer"])


def test_a_placement_decides_who_has_what():
    stats = made_up(np.random.default_rng(1), 1)
    ranks = [[0, 1, 2, 3] * 2, [3, 2, 1, 0] * 2, [0, 0, 1, 1, 2, 2, 3, 3]]
    zero = made_up(np.random.default_rng(1), 0)
    moe = window_report(sample(zero), sample(stats | {"placement": ranks}), "decode")["moe"]
    expected = [sum(n for row, at in zip(stats["decode"]["counts"], ranks, strict=True)
                    for n, rank in zip(row, at, strict=True) if rank == r) for r in range(4)]  # fmt: skip
    assert moe["rank_load"] == expected and moe["rank_of_expert"] == ranks


def test_a_report_of_nothing_has_no_means():
    stats = made_up(np.random.default_rng(1), 1)
    report = window_report(sample(stats), sample(stats), "all")
    assert report["moe"]["active_experts"] is None and report["moe"]["rank_max_over_mean"] is None
    assert report["serve"]["time_to_first_token_ms"] == {"p50": None, "p95": None, "p99": None}
    json.dumps(report, allow_nan=False)


def test_a_report_tells_of_the_server():
    stats, live = made_up(np.random.default_rng(1), 1), Totals()
    before = sample(stats, live, prefix_queries=10, prefix_hits=5)
    live.prompt_tokens, live.generation_tokens, live.rejected, live.steps = 100, 40, 2, 7
    for _ in range(9):
        live.first_token.add(0.1)
    after = sample(stats, live, prefix_queries=40, prefix_hits=15, preemptions=3)
    report = window_report(before, after, "all")
    serve, seconds = report["serve"], after.time - before.time
    assert serve["prefill_tokens_per_second"] == pytest.approx(100 / seconds, rel=1e-3)
    assert serve["decode_tokens_per_second"] == pytest.approx(40 / seconds, rel=1e-3)
    assert (serve["rejected"], serve["steps"], serve["preemptions"]) == (2, 7, 3)
    assert (serve["prefix_queries"], serve["prefix_hits"], serve["kv_usage"]) == (30, 10, 0.5)
    assert serve["time_to_first_token_ms"]["p50"] == pytest.approx(100, rel=0.1)


# ---- routes ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def listener(url: str, query: str = "", **headers: str):
    """Yields the reports of a stream, as an iterator."""
    with httpx.stream("GET", f"{url}/moe/events{query}", headers=headers, timeout=60) as answer:
        assert answer.status_code == 200, answer.read()
        yield (json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: "))


def test_stats_without_a_window_are_as_the_engine_has_them():
    with served(CountingEngine()) as client:
        assert client.get("/moe/stats").json() == made_up(np.random.default_rng(1), 1)


def test_stats_of_a_window():
    with served(CountingEngine(codec=ByteCodec())) as client:
        report = client.get("/moe/stats?window=5&phase=decode").json()
    assert report["state"] == "ready" and report["name"] == "fake" and report["phase"] == "decode"
    assert report["window_s"] > 0.8 and report["moe"]["steps"] == 5


BAD_QUERIES = (
    ("window=0", "window"), ("window=61", "window"), ("window=ten", "window"), ("window=٣", "window"),
    ("phase=both", "phase"), ("windows=5", "windows"),
)  # fmt: skip


@pytest.mark.parametrize(("query", "param"), BAD_QUERIES)
@pytest.mark.parametrize("path", ["/moe/stats", "/moe/events"])
def test_a_bad_query_is_refused(path, query, param):
    with served(CountingEngine()) as client:
        answer = client.get(f"{path}?{query}")
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_listeners_share_one_look_a_second(monkeypatch):
    """All listeners share one look at the engine per second.

    The clock goes on by a second when all have come and have read all reports.
    """
    monkeypatch.setattr(poll, "STAYS", 0.0)
    engine, second = CountingEngine(), threading.Semaphore(0)
    with listening(engine) as (url, server), contextlib.ExitStack() as stack:
        shared = server.service.poll
        take = shared.take

        def taken():
            second.acquire()
            return dataclasses.replace(take(), time=float(engine.looks))

        shared.take = taken
        streams = [stack.enter_context(listener(url, f"?window={w}")) for w in (1, 10, 10)]
        assert eventually(lambda: shared.num_listeners == 3)
        reports = []
        for _ in range(3):
            second.release()
            reports.append([next(stream) for stream in streams])
        assert engine.looks == 3
        of_one, of_ten, other = zip(*reports, strict=True)
        assert [one["window_s"] for one in of_ten] == [0, 1, 2]
        assert [one["moe"]["steps"] for one in of_one] == [0, 7, 7]  # one report a second
        assert [one["moe"]["steps"] for one in of_ten] == [0, 7, 14]  # all steps up to now
        assert of_ten == other
        stack.close()
        assert eventually(lambda: shared.num_listeners == 0)
        second.release()  # this is for the look that has begun; nobody looks again
        assert eventually(lambda: shared._task.done()) and engine.looks <= 4


def test_nobody_looking_costs_the_engine_nothing():
    engine = CountingEngine()
    with served(engine) as client:
        client.post("/v1/completions", json={"prompt": [97], "max_tokens": 3})
        client.get("/dashboard")
        assert engine.looks == 0 and client.service.poll._task is None


def test_a_listener_that_does_not_read_is_dropped(monkeypatch):
    monkeypatch.setattr(dashboard, "WRITE_TIMEOUT", 0.05)

    async def run(service) -> None:
        stream = dashboard.ReportStream(service.poll, 10, "all")

        async def send(message) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()  # its connection is full

        await asyncio.wait_for(stream({}, asyncio.Event().wait, send), 60)
        assert service.poll.num_listeners == 0

    with served(CountingEngine()) as client:
        client.portal.call(run, client.service)


def test_listeners_are_limited(monkeypatch):
    monkeypatch.setattr(dashboard, "LISTENERS", 1)
    with listening(CountingEngine()) as (url, _), listener(url) as reports:
        next(reports)
        refused = httpx.get(f"{url}/moe/events", timeout=60)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "too_many_listeners"


def test_events_tell_of_the_drain_and_end_with_the_server(caplog):
    engine = CountingEngine(pace=0.005, holds_at=1)
    with listening(engine) as (url, server), listener(url) as reports:
        assert next(reports)["state"] == "ready"
        body = {"prompt": [97], "max_tokens": 60}
        asked = {"json": body, "timeout": 60}
        thread = threading.Thread(target=httpx.post, args=(f"{url}/v1/completions",), kwargs=asked)
        thread.start()
        assert eventually(lambda: engine.running)
        server.ask_to_stop()
        for report in reports:  # which end
            if report["state"] == "draining":
                engine.going.set()
        thread.join()
    assert engine.going.is_set()
    assert not [r for r in caplog.records if r.levelname == "ERROR"]


def test_events_end_with_the_engine():
    engine = CountingEngine()
    with listening(engine) as (url, server), listener(url) as reports:
        next(reports)
        engine.alive = False
        engine.moe_stats = FakeEngine.moe_stats.__get__(engine)  # it raises EngineDead
        assert len(list(itertools.islice(reports, 60))) < 60
        assert eventually(lambda: server.service.poll.num_listeners == 0)


def test_events_need_the_key_and_the_page_does_not():
    with served(CountingEngine(), api_key="k") as client:
        for path in ("/moe/events", "/moe/stats"):
            assert client.get(path).status_code == 401
        assert client.get("/dashboard").status_code == client.get("/moe").status_code == 200
