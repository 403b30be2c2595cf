"""Tests log lines: their form, what they say about a request, and that nobody can forge them."""

import asyncio
import json
import logging
import subprocess
import sys
from urllib.parse import quote

import pytest
from support.server.fake_engine import ByteCodec, FakeEngine, eventually, served

from jmoe.cli.flags import given_settings
from jmoe.engine.reports import EngineSnapshot
from jmoe.server.watch.logs import JsonLines, TextLines, configure, printable
from jmoe.server.watch.totals import Totals, log_traffic

EVIL = "x\n2026-01-01 00:00:00 CRITICAL all is lost\r\x1b[31m\u2028\u202e\x00"


def record(message: str, *args, **fields) -> logging.LogRecord:
    made = logging.LogRecord("jmoe.test", logging.WARNING, "f.py", 1, message, args, None)
    made.fields = fields
    return made


def failed() -> logging.LogRecord:
    made = record("it failed")
    try:
        raise ValueError(EVIL)
    except ValueError as error:
        made.exc_info = (type(error), error, error.__traceback__)
    return made


@pytest.mark.parametrize("form", [TextLines(), JsonLines()])
def test_a_line_is_a_line_whatever_is_in_it(form):
    for made in (record("got %s", EVIL), record("got", name=EVIL)):
        line = form.format(made)
        assert line.isprintable() and "all is lost" in line


def test_a_traceback_cannot_look_like_a_line_of_its_own():
    first, *rest = TextLines().format(failed()).split("\n")
    assert first.endswith("WARNING it failed") and len(rest) > 3
    assert all(line.startswith("    ") and line.isprintable() for line in rest)
    assert "\n" not in JsonLines().format(failed())


def test_json_lines_are_objects():
    line = json.loads(JsonLines().format(record("got %d", 3, request_id="r1", ms=1.5)))
    assert line.pop("time").endswith("+00:00")
    expected = {"level": "warning", "logger": "jmoe.test", "message": "got 3", "request_id": "r1", "ms": 1.5}
    assert line == expected
    assert "ValueError" in json.loads(JsonLines().format(failed()))["exception"]


def test_text_lines_show_fields():
    assert TextLines().format(record("answered", status=200, ms=1.5)).endswith("answered status=200 ms=1.5")


def test_printable_keeps_ordinary_text():
    assert printable("naïve 漢字 a b") == "naïve 漢字 a b"
    assert printable("a\tb\u2028") == "a\\tb\\u2028"


@pytest.mark.parametrize(
    ("form", "level", "named"), [("xml", "info", "log_format"), ("text", "loud", "log_level")]
)
def test_unknown_settings_are_refused(form, level, named):
    with pytest.raises(ValueError, match=named):
        configure(form, level)


def test_each_answer_is_one_line_without_its_prompt(caplog):
    caplog.set_level(logging.INFO)
    with served(FakeEngine(ByteCodec())) as client:
        body = {"prompt": "a secret", "max_tokens": 3, "n": 2}
        client.post("/v1/completions", json=body, headers={"x-request-id": "r1"})
        client.get("/v1/models/" + quote(EVIL))
        for path in ("/live", "/ready", "/health", "/ping", "/metrics"):
            client.get(path)
    lines = [r.fields for r in caplog.records if r.message == "answered"]
    assert [(line["method"], line["route"], line["status"]) for line in lines] == [
        ("POST", "/v1/completions", 200), ("GET", "unknown", 404),
    ]  # fmt: skip
    assert lines[0]["request_id"] == "r1" and lines[0]["ms"] > 0
    assert (lines[0]["prompt_tokens"], lines[0]["tokens"]) == (len("a secret") + 1, 6)
    ours = " ".join(TextLines().format(r) for r in caplog.records if r.name.startswith("jmoe"))
    assert "secret" not in ours and "all is lost" not in ours


def test_an_error_of_ours_is_a_line_with_its_status(caplog):
    caplog.set_level(logging.INFO)
    with served(FakeEngine()) as client:
        client.service.engine.moe_stats = lambda: 1 / 0
        assert client.get("/moe/stats").status_code == 500
    assert [r.fields["status"] for r in caplog.records if r.message == "answered"] == [500]


def test_traffic_is_logged_while_there_is_some(caplog):
    caplog.set_level(logging.INFO)
    engine, live = FakeEngine(), Totals()
    snapshots = iter([EngineSnapshot(0, 0, 0.0, True, 0), EngineSnapshot(2, 1, 0.5, True, 0, 0, 100, 25)])
    last = EngineSnapshot(0, 0, 0.0, True, 0, 0, 100, 25)
    periods = []

    def snapshot() -> EngineSnapshot:
        periods.append(1)
        return next(snapshots, last)

    engine.snapshot = snapshot

    async def run() -> None:
        task = asyncio.create_task(log_traffic(engine, live, 0.05))
        while not periods:
            await asyncio.sleep(0)
        live.prompt_tokens, live.generation_tokens = 10, 5
        while len(periods) < 6:  # one of these periods has news
            await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(run())
    engine.closing = True
    assert [r.getMessage() for r in caplog.records] == [
        "prompt 200.0 tok/s, generation 100.0 tok/s, running 2, waiting 1, KV 50.0 %, prefix hits 25.0 %"
    ]


def test_the_first_line_tells_what_was_set_and_no_key():
    values = {"command": "serve", "run": print, "model": "tiny", "port": 1, "api_key": "geheim"}
    assert given_settings(values) == "api_key=***, model=tiny, port=1"
    assert given_settings({"command": "serve", "run": print}) == "none"


def test_the_client_that_leaves_is_a_line_too(caplog):
    caplog.set_level(logging.INFO)
    with served(FakeEngine(pace=0.05)) as client:
        body = {"prompt": [97], "max_tokens": 50, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
        assert eventually(lambda: any(r.message == "answered" for r in caplog.records))


NOISY = """
import threading, warnings
from jmoe.server.watch.logs import configure
configure("json", "info")
warnings.warn("two\\nlines", RuntimeWarning)
thread = threading.Thread(target=lambda: 1 / 0, name="some-thread")
thread.start()
thread.join()

class Untold:
    def __del__(self):
        raise KeyError("gone")

Untold()
raise OSError("the end")
"""


def test_what_python_writes_itself_is_json_too():
    """Warnings and exceptions that nobody catches, which Python itself writes, are JSON too.

    The exceptions are on a thread, in a finalizer and in the program.
    """
    done = subprocess.run([sys.executable, "-c", NOISY], capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.returncode == 1 and len(lines) == 4
    warning, thread, finalizer, end = lines
    assert warning["level"] == "warning" and "two\nlines" in warning["message"]
    assert "some-thread" in thread["message"] and "ZeroDivisionError" in thread["exception"]
    assert "KeyError" in finalizer["exception"] and "the end" in end["exception"]
