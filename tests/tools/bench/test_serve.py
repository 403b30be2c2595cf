"""Tests ``jmoe bench serve`` with a small HTTP server of set answers, and with the fake engine's server."""

import asyncio
import gzip
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from support.server.fake_engine import ByteCodec, FakeEngine, listening

from jmoe.cli.main import main
from jmoe.tools.bench.http import Client, Failure
from jmoe.tools.bench.loads import Load, LoadCall
from jmoe.tools.bench.replay import replay


class Handler(BaseHTTPRequestHandler):
    """Answers completions with ``max_tokens`` events "x". The field "user" may name a fault to make."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        listed = {"data": [{"id": "m", "max_model_len": 64}]}
        self._whole(200 if self.path == "/v1/models" else 404, json.dumps(listed).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path != "/v1/completions":
            return self._whole(404, b"")
        self.server.seen.append(body)
        wrong = body.get("user")
        if wrong == "refused":
            return self._whole(400, b'{"error": {"message": "no such\\nthing"}}')
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for _ in range(body["max_tokens"]):
            self._event({"choices": [{"index": 0, "text": "x", "finish_reason": None}]})
            if wrong == "broken":
                return self._break_off()
            if wrong == "error":
                return self._end({"error": {"message": "NaN"}})
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        self._event({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        self._end({"choices": [], "usage": usage | {"total_tokens": 0}})

    def _whole(self, status, content):
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _event(self, content):
        data = b"data: " + json.dumps(content).encode() + b"\n\n"
        half = len(data) // 2
        for part in (data[:half], data[half:]):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            self.wfile.flush()

    def _end(self, content):
        self._event(content)
        self.wfile.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    def _break_off(self):
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        made.seen, made.daemon_threads, made.block_on_close = [], True, False
        made.url = f"http://127.0.0.1:{made.server_port}"
        threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
        yield made
        made.shutdown()


def run(capsys, *argv) -> tuple[int, str, str]:
    try:
        code = main([*map(str, argv)])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def bench(capsys, server, *argv) -> tuple[int, str, str]:
    return run(capsys, "bench", "serve", "--base-url", server.url, *argv)


# ---- a run


def test_a_run_on_a_server(capsys, server):
    server.seen.clear()
    args = (
        "--num-prompts",
        6,
        "--input-len",
        5,
        "--output-len",
        3,
        "--max-concurrency",
        2,
        "--vocab-size",
        9,
    )
    code, out, err = bench(capsys, server, *args, "--json")
    report = json.loads(out)
    assert code == 0
    assert (report["completed"], report["failed"], report["total_input_tokens"]) == (6, 0, 30)
    assert report["total_output_tokens"] == 18 and report["max_concurrent_requests"] <= 2
    assert report["tokens_counted_by"] == "usage" and report["moe"] is None and report["quality"] is None
    assert report["output_throughput"] == pytest.approx(18 / report["duration"])
    sent = server.seen[1:]  # after the one that warms up
    assert len(sent) == 6 and len({tuple(body["prompt"]) for body in sent}) > 1
    assert all(len(b["prompt"]) == 5 and set(b["prompt"]) <= set(range(9)) for b in sent)
    assert all(b["ignore_eos"] and b["stream_options"] == {"include_usage": True} for b in sent)
    assert err.splitlines()[-1] == "6 of 6 requests (100 %)" and len(err.splitlines()) == 6


def test_a_seed_gives_the_same_prompts(capsys, server):
    args = (
        "--num-prompts",
        3,
        "--input-len",
        8,
        "--output-len",
        1,
        "--vocab-size",
        50,
        "--max-concurrency",
        1,
    )
    prompts = []
    for seed in (1, 1, 2):
        server.seen.clear()
        assert bench(capsys, server, *args, "--seed", seed)[0] == 0
        prompts.append([body["prompt"] for body in server.seen])
    assert prompts[0] == prompts[1] != prompts[2]


def test_the_block_is_vllms(capsys, server):
    code, out, _ = bench(
        capsys, server, "--num-prompts", 2, "--output-len", 2, "--input-len", 4, "--prompt-form", "text",
        "--goodput", "ttft:10000,tpot:10000", "--request-rate", 100,
    )  # fmt: skip
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == "============ Serving Benchmark Result ============"
    assert lines[1] == "Successful requests:                     2"
    names = [re.split(r":\s+", line)[0] for line in lines[1 : lines.index("=" * 50)] if ":  " in line]
    latencies = [f"{k} {n} (ms)" for n in ("TTFT", "TPOT", "ITL", "E2EL") for k in ("Mean", "Median", "P99")]
    assert names == [
        "Successful requests", "Failed requests", "Request rate configured (RPS)", "Benchmark duration (s)",
        "Total input tokens", "Total generated tokens", "Request throughput (req/s)",
        "Request goodput (req/s)", "Output token throughput (tok/s)", "Peak output token throughput (tok/s)",
        "Peak concurrent requests", "Total token throughput (tok/s)", *latencies,
    ]  # fmt: skip
    assert "---------------Time to First Token----------------" in lines
    assert "-----Time per Output Token (excl. 1st token)------" in lines
    assert any(line.startswith("sent late by (ms): median") for line in lines)


def test_clipping_is_reported(capsys, server, tmp_path):
    trace = tmp_path / "t.jsonl.gz"
    rows = [(0, 100, 20), (5, 10, 4), (7, 10, 100)]
    names = ("timestamp", "input_length", "output_length")
    with gzip.open(trace, "wt") as file:
        file.writelines(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows)
    server.seen.clear()
    code, out, _ = bench(capsys, server, "--trace", trace, "--max-output-len", 10, "--vocab-size", 9)
    assert code == 0
    sent = [(len(body["prompt"]), body["max_tokens"]) for body in server.seen[1:]]
    assert sorted(sent) == [(10, 4), (10, 10), (54, 10)]  # within milliseconds they may come in any order
    assert "clipped: 0 prompts, 2 answers, 1 to the model's context; 46 and 100 tokens in all" in out


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        ("refused", "HTTP 400: no such thing"),
        ("broken", "the connection broke off"),
        ("error", "error in the stream: NaN"),
    ],
)
def test_failed_requests_count_by_cause(capsys, server, wrong, cause):
    args = ("--num-prompts", 3, "--input-len", 4, "--output-len", 2, "--vocab-size", 9, "--num-warmups", 0)
    code, out, _ = bench(capsys, server, *args, "--extra-body", json.dumps({"user": wrong}), "--json")
    report = json.loads(out)
    assert code == 1 and report["completed"] == 0
    assert report["failures"] == {cause: 3} and report["total_output_tokens"] == 0


def test_details_hold_every_request(capsys, server, tmp_path):
    path = tmp_path / "details.json"
    args = (
        "--num-prompts",
        3,
        "--input-len",
        4,
        "--output-len",
        4,
        "--vocab-size",
        9,
        "--save-details",
        path,
    )
    assert bench(capsys, server, *args)[0] == 0
    saved = json.loads(path.read_text())["details"]
    assert saved["output_lens"] == [4, 4, 4] and [len(gaps) for gaps in saved["itls"]] == [3, 3, 3]
    for ttft, gaps, e2el in zip(saved["ttfts"], saved["itls"], saved["e2els"], strict=True):
        assert ttft > 0 and ttft + sum(gaps) <= e2el


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--base-url", "127.0.0.1:1"), "no connection"),
        (("--base-url", "ftp://x"), "base-url must be like"),
        (("--num-prompts", 0), "must be at least 1"),
        (("--request-rate", 0), "must be above 0"),
        (("--goodput", "itl:3"), "goodput knows ttft, tpot, e2el"),
        (("--goodput", "ttft"), "is not like ttft:500"),
        (("--extra-body", "[1]"), "not a JSON object"),
        (("--trace", "/nowhere.jsonl"), "cannot read /nowhere.jsonl"),
        (("--endpoint", "chat", "--prompt-form", "ids"), "a chat's messages are text"),
        (("--extra-body", '{"user": "refused"}', "--vocab-size", 9), "the first request failed: HTTP 400"),
        ((), "give --vocab-size, or --prompt-form text"),
    ],
)
def test_what_cannot_be_measured_is_one_line(capsys, server, args, said):
    code, out, err = bench(capsys, server, *args)
    assert code == 2 and out == "" and said in err and len(err.splitlines()) == 1


def test_a_closed_connection_is_not_a_failure(server):
    """A closed kept connection is not a failure, and the next request gets a new connection.

    Servers may close kept connections at any time.
    """

    async def twice():
        client = Client(server.url)
        await client.send("GET", "/v1/models")
        client.idle_connections[0].transport.close()  # as if the server had closed it, before we notice
        answer = await client.send("GET", "/v1/models")
        client.close()
        return answer.status

    assert asyncio.run(twice()) == 200


def test_an_answer_that_does_not_come_times_out():
    async def ask():
        async def silent(reader, writer):
            await reader.read()  # until the client leaves
            writer.close()

        listener = await asyncio.start_server(silent, "127.0.0.1", 0)
        client = Client(f"127.0.0.1:{listener.sockets[0].getsockname()[1]}", timeout=0.05)
        async with listener:
            with pytest.raises(Failure, match="no answer within"):
                await client.send("GET", "/")

    asyncio.run(ask())


def test_requests_go_out_when_they_are_due(server):
    """Requests go out when they are due, however long the answers take. The wait for room is not lag."""
    times = [0.0, 0.05, 0.05, 0.2]
    load = Load([LoadCall(at, 1, 1) for at in times], is_timed=True)
    bodies = [json.dumps({"prompt": [1], "max_tokens": 1}).encode()] * 4

    async def send(most):
        client = Client(server.url)
        ran = await replay(client, "/v1/completions", load, bodies, most)
        client.close()
        return ran

    begin = time.perf_counter()
    ran = asyncio.run(send(None))
    assert all(result.cause is None for result in ran.results)
    begins = [result.send_time - result.lag - at for at, result in zip(times, ran.results, strict=True)]
    assert min(begins) >= begin and ran.seconds >= 0.2


# ---- our own server


def test_the_fake_engines_server(capsys):
    with listening(FakeEngine(ByteCodec(), max_model_len=64)) as (url, _):
        args = ("--num-prompts", 8, "--input-len", 6, "--output-len", 5, "--max-concurrency", 4, "--json")
        code, out, err = run(capsys, "bench", "serve", "--base-url", url, *args)
    report = json.loads(out)
    assert code == 0, err
    assert (report["total_input_tokens"], report["total_output_tokens"]) == (48, 40)
    assert report["model"] == "fake" and report["max_concurrent_requests"] <= 4


def test_quality_of_a_lossless_server_is_that_of_exact(capsys, tmp_path):
    """The quality of a lossless server is that of ``exact``.

    The fake engine's score is -0.5 for every token, and its answers are the same with and without it.
    """
    data = tmp_path / "d.txt"
    data.write_text("some text to be scored, longer than one window of sixty-four bytes is\n" * 3)
    engine = FakeEngine(ByteCodec(), max_model_len=64)
    with listening(engine) as (url, _):
        args = ("--num-prompts", 1, "--input-len", 4, "--output-len", 2)
        code, out, err = run(
            capsys,
            "bench",
            "serve",
            "--base-url",
            url,
            *args,
            "--quality-data",
            data,
            "--quality-tokens",
            100,
        )
    assert code == 0, err
    exact = [r.params.exact for r in engine.seen[2:]]
    assert True in exact and False in exact
    assert "Scored prompt tokens:                    100" in out
    assert "Perplexity, as served:                   1.6487" in out
    assert "Equal to the exact ones:                 100.00%" in out
    assert "Difference (nats a token):               +0.00000" in out
