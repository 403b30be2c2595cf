"""Tests the dashboard's page: what it must not contain, and what it shows in a browser."""

import json
import re

import httpx
import pytest
from support.server.browser import CHROMIUM, browser
from support.server.counting_engine import RANKS, CountingEngine
from support.server.fake_engine import ByteCodec, FakeEngine, listening, served

from jmoe.config.counters import LOSSY, names


def test_the_page_is_small_whole_and_without_data():
    with served(CountingEngine(), served_model_name="a-name") as client:
        first, second = client.get("/dashboard"), client.get("/moe")
    assert len(first.content) <= 40_000 and first.headers["content-type"].startswith("text/html")
    policy = first.headers["content-security-policy"]
    nonces = set(re.findall(r'nonce="([^"]+)"', first.text))
    assert len(nonces) == 1 and set(re.findall(r"'nonce-([^']+)'", policy)) == nonces
    assert nonces != set(re.findall(r'nonce="([^"]+)"', second.text))
    assert "unsafe" not in policy and "default-src 'none'" in policy
    text = first.text.replace("http://www.w3.org/2000/svg", "")  # this is a name, which is not fetched
    assert not re.search(r"(https?:)?//\w", text.replace("// ", "")) and "a-name" not in text
    assert f"const LOSSY = {json.dumps(names(LOSSY), separators=(',', ':'))};" in text
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
            assert "Evictions" in words(tab, "#cache")
            assert all(name in words(tab, "#lossy").lower() for name in names(LOSSY))
            tab.evaluate("document.getElementById('cells').open = true")
            tab.until("document.querySelectorAll('#cells td').length === 24")
            tab.evaluate("document.getElementById('layers').open = true")
            tab.until("document.querySelectorAll('#layers tbody tr').length === 3")
            assert report["moe"]["counts"] and len(report["moe"]["rank_load"]) == RANKS
            _check_heat_map(tab)
        assert all(asked.startswith((url, "data:")) for asked in tab.requests)
        assert tab.errors == []


def _check_heat_map(tab) -> None:
    """Checks that keys move over the heat map, that the spoken text is right, and that the map is painted."""
    tab.evaluate("stream.abort()")  # so that the numbers do not change during the comparison
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
