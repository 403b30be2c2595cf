"""The dashboard: its reports, who shares them, its page, and the page in a browser."""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import re
import threading

import httpx
import numpy as np
import pytest
from support.server.browser import CHROMIUM, browser
from support.server.fake_engine import ByteCodec, FakeEngine, eventually, listening, served

from jmoe.engine.request import EngineSnapshot, StepReport
from jmoe.server.routes import dashboard
from jmoe.server.watch import poll
from jmoe.server.watch.snapshots import MEANS, SUMS, take_snapshot, window_report
from jmoe.server.watch.totals import Seconds, Totals, percentile

LAYERS, EXPERTS, RANKS = 3, 8, 4


class CountingEngine(FakeEngine):
    """Its experts' counts grow with each look, which it counts; each token is a step that it reports."""

    looks = 0

    def moe_stats(self):
        self.looks += 1
        return made_up(np.random.default_rng(1), self.looks)

    def _step(self, request):
        super()._step(request)
        for listener in self.listeners:
            listener.stepped(StepReport(3, 1, 0.004, 0.001))


def made_up(rng, times: int) -> dict:
    """Statistics of an engine that did the same ``times`` times over."""

    def phase(steps: int) -> dict:
        counts = rng.integers(0, 50, (LAYERS, EXPERTS))
        layers = [
            {name: float(rng.uniform(1, 8)) for name in MEANS}
            | {name: int(rng.integers(1, 1000)) * times for name in SUMS}
            | {"assignments": int(row.sum()) * times}
            for row in counts
        ]
        return {"steps": steps * times, "per_layer": layers, "counts": (counts * times).tolist()}

    model = {"layers": 4, "moe_layers": [1, 2, 3], "experts": EXPERTS, "top_k": 2}
    mesh = {"data": 1, "expert": RANKS, "tensor": 1}
    return {"model": model, "mesh": mesh, "prefill": phase(2), "decode": phase(5)}


def sample(stats: dict, live: Totals | None = None, **snapshot):
    numbers = {"running": 1, "waiting": 2, "kv_usage": 0.5, "alive": True, "compilations_after_warmup": 0}
    return take_snapshot(EngineSnapshot(**numbers | snapshot), stats, live or Totals())


# ---- numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 0.95, 0.99])
def test_percentiles_are_right_within_a_bucket(share):
    times = np.random.default_rng(0).lognormal(-4, 2, 5000)
    seconds = Seconds()
    for t in times:
        seconds.add(t)
    exact = np.quantile(times, share)
    assert percentile(np.array(seconds.counts), share) == pytest.approx(exact, rel=0.1)
    assert percentile(np.zeros(5), share) is None


def test_times_out_of_range_go_to_the_outer_buckets():
    seconds = Seconds()
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
    """The reports of a stream, as an iterator."""
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
    """Of a clock that goes on by a second when all have come and have read what there is."""
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
        assert eventually(lambda: shared.listeners == 3)
        reports = []
        for _ in range(3):
            second.release()
            reports.append([next(stream) for stream in streams])
        assert engine.looks == 3
        of_one, of_ten, other = zip(*reports, strict=True)
        assert [one["window_s"] for one in of_ten] == [0, 1, 2]
        assert [one["moe"]["steps"] for one in of_one] == [0, 7, 7]  # a second each
        assert [one["moe"]["steps"] for one in of_ten] == [0, 7, 14]  # all that there is so far
        assert of_ten == other
        stack.close()
        assert eventually(lambda: shared.listeners == 0)
        second.release()  # for the look that has begun; nobody looks again
        assert eventually(lambda: shared._task.done()) and engine.looks <= 4


def test_nobody_looking_costs_the_engine_nothing():
    engine = CountingEngine()
    with served(engine) as client:
        client.post("/v1/completions", json={"prompt": [97], "max_tokens": 3})
        client.get("/dashboard")
        assert engine.looks == 0 and client.service.poll._task is None


def test_a_listener_that_does_not_read_is_dropped(monkeypatch):
    monkeypatch.setattr(dashboard, "PATIENCE", 0.05)

    async def run(service) -> None:
        stream = dashboard.ReportStream(service.poll, 10, "all")

        async def send(message) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()  # its connection is full

        await asyncio.wait_for(stream({}, asyncio.Event().wait, send), 60)
        assert service.poll.listeners == 0

    with served(CountingEngine()) as client:
        client.portal.call(run, client.service)


def test_listeners_are_limited(monkeypatch):
    monkeypatch.setattr(dashboard, "LISTENERS", 1)
    with listening(CountingEngine()) as (url, _), listener(url) as reports:
        next(reports)
        refused = httpx.get(f"{url}/moe/events")
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
        engine.moe_stats = FakeEngine.moe_stats.__get__(engine)  # which raises EngineDead
        assert len(list(itertools.islice(reports, 60))) < 60
        assert eventually(lambda: server.service.poll.listeners == 0)


def test_events_need_the_key_and_the_page_does_not():
    with served(CountingEngine(), api_key="k") as client:
        for path in ("/moe/events", "/moe/stats"):
            assert client.get(path).status_code == 401
        assert client.get("/dashboard").status_code == client.get("/moe").status_code == 200


# ---- the page --------------------------------------------------------------------------------------------


def test_the_page_is_small_whole_and_without_data():
    with served(CountingEngine(), served_model_name="a-name") as client:
        first, second = client.get("/dashboard"), client.get("/moe")
    assert len(first.content) <= 40_000 and first.headers["content-type"].startswith("text/html")
    policy = first.headers["content-security-policy"]
    nonces = set(re.findall(r'nonce="([^"]+)"', first.text))
    assert len(nonces) == 1 and set(re.findall(r"'nonce-([^']+)'", policy)) == nonces
    assert nonces != set(re.findall(r'nonce="([^"]+)"', second.text))
    assert "unsafe" not in policy and "default-src 'none'" in policy
    text = first.text.replace("http://www.w3.org/2000/svg", "")  # a name, which is not fetched
    assert not re.search(r"(https?:)?//\w", text.replace("// ", "")) and "a-name" not in text
    assert not re.search(r"\son\w+=|innerHTML|eval\(|\sstyle=", text)


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


@pytest.fixture
def tab(tmp_path):
    with browser(tmp_path) as page:
        yield page


def go(tab, url: str) -> None:
    tab.evaluate("window.before = true")
    tab.call("Page.navigate", url=f"{url}/dashboard")
    tab.until("!window.before && typeof listen === 'function'")


def words(tab, selector: str) -> str:
    return tab.evaluate(f"document.querySelector({selector!r}).textContent")


@needs_browser
def test_the_page_shows_numbers_and_asks_nobody_else(tab):
    engine = CountingEngine(codec=ByteCodec(), pace=0.002, max_model_len=100_000)
    with listening(engine) as (url, _):
        body = {"prompt": "abc", "max_tokens": 90_000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60):
            go(tab, url)
            tab.until("report && report.window_s > 1.5")
            report = tab.evaluate("report")
            assert words(tab, "#name") == "fake" and words(tab, "#state") == "ready"
            assert words(tab, "#shape").startswith("3 MoE layers of 8 experts, top 2 · 4 devices")
            assert float(words(tab, "#decode").replace(",", "")) > 0 and words(tab, "#running") == "1"
            assert float(words(tab, "#itl")) > 1 and words(tab, "#kv") == "25"
            assert "Straggler ratio" in words(tab, "#ranks") and "rank 3" in words(tab, "#ranks")
            assert "Dropped" in words(tab, "#lossy") and "Evictions" in words(tab, "#cache")
            tab.evaluate("document.getElementById('cells').open = true")
            tab.until("document.querySelectorAll('#cells td').length === 24")
            tab.evaluate("document.getElementById('layers').open = true")
            tab.until("document.querySelectorAll('#layers tbody tr').length === 3")
            assert report["moe"]["counts"] and len(report["moe"]["rank_load"]) == RANKS
            _check_heat_map(tab)
        assert all(asked.startswith((url, "data:")) for asked in tab.requests)
        assert tab.errors == []


def _check_heat_map(tab) -> None:
    """Keys move over it, what is said is right, and it is painted."""
    tab.evaluate("stream.abort()")  # so that numbers stay while they are compared
    tab.evaluate("document.getElementById('heat').focus()")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        event = f"new KeyboardEvent('keydown', {{key: '{key}', cancelable: true}})"
        tab.evaluate(f"document.getElementById('heat').dispatchEvent({event})")
    n = tab.evaluate("report.moe.counts[1][1]")
    said = words(tab, "#spoken")
    assert said == words(tab, "#readout") and said.startswith(f"Layer 2, expert 1: {n:,} tokens,")
    assert said.endswith("rank 0.")
    colours = tab.evaluate(
        "(() => { const c = document.getElementById('heat'), d = c.getContext('2d');"
        "const at = d.getImageData(0, 0, c.width, c.height).data, seen = new Set();"
        "for (let i = 0; i < at.length; i += 4)"
        "  if (at[i + 3] === 255) seen.add(at[i] << 16 | at[i + 1] << 8 | at[i + 2]);"
        "return seen.size; })()"
    )
    assert colours > 5


@needs_browser
def test_the_page_asks_for_the_key_and_keeps_it(tab):
    with listening(CountingEngine(), api_key="right") as (url, _):
        go(tab, url)
        tab.until("!document.getElementById('key').hidden")
        assert words(tab, "#state") == "needs a key"
        refused = "/did not take/.test(document.getElementById('key-note').textContent)"
        shown = "document.getElementById('key').hidden && report !== null"
        for key, seen in (("wrong", refused), ("right", shown)):
            tab.evaluate(f"document.getElementById('key-text').value = '{key}'")
            tab.evaluate("document.querySelector('#key form').requestSubmit()")
            tab.until(seen)
        go(tab, url)
        tab.until("report !== null && document.getElementById('key').hidden")


@needs_browser
def test_the_page_says_when_nothing_runs_and_when_the_server_is_lost(tab):
    engine = FakeEngine()
    with listening(engine) as (url, _):
        go(tab, url)
        tab.until("report && report.window_s > 0.5")
        assert "No tokens in this window" in words(tab, "#experts-note")
        assert "Without [moe.offload]" in words(tab, "#cache")
        assert "no request in this window" in words(tab, "#ttft-note")
        size = {"width": 360, "height": 800}
        tab.size(**size, phone=True)
        assert tab.evaluate("document.documentElement.scrollWidth") == 360
    tab.until("document.getElementById('state').textContent === 'lost'")
