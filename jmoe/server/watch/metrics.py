"""Prometheus metrics of one server, in its own registry."""

from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jmoe.config.counters import COUNTERS
from jmoe.engine.reports import StepReport
from jmoe.engine.request import EngineDead, FinishReason, Request
from jmoe.server.engine_api import EngineProtocol
from jmoe.server.watch.snapshots import load_by_rank, rank_of_expert
from jmoe.server.watch.totals import Totals

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5, 10, 20, 40, 80, 160, 640, 2560)
# A decode step of a small model takes half a millisecond: coarser buckets would hide it.
TOKEN_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 1, 2, 5)
TOKENS = tuple(2**i for i in range(0, 20, 1))
MOE_COUNTERS = [(c.metric, c.text, c.name) for c in COUNTERS if c.metric is not None]
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Metrics:
    """An engine listener that counts, and makes the text of ``GET /metrics``.

    ``token``, ``stepped`` and ``finished`` are called only on the engine's thread, so the times of the last
    tokens need no lock; ``count_answer`` and ``count_rejection`` are called on the event loop.

    totals: the same counts in a form that can be subtracted, for the dashboard and the log.
    """

    def __init__(self, engine: EngineProtocol):
        self.registry = CollectorRegistry()
        self.totals = Totals()
        self.last_token: dict[str, float] = {}
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens processed")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated")
        self.requests = self._counter("request_success", "Requests ended, by reason", ["finished_reason"])
        self.reason_counters = {reason: self.requests.labels(reason) for reason in get_args(FinishReason)}
        self.rejections = self._counter("admission_rejections", "Requests refused with a 503", ["reason"])
        self.answers = self._counter("http_requests", "HTTP answers", ["method", "status", "handler"])
        self.first_token = self._seconds("time_to_first_token", "From arrival to the first token")
        self.token_gap = self._seconds(
            "inter_token_latency", "Between two tokens of a request", TOKEN_SECONDS
        )
        mean = "Mean between two tokens, one observation a request"
        self.mean_token_gap = self._seconds("request_time_per_output_token", mean, TOKEN_SECONDS)
        self.latency = self._seconds("e2e_request_latency", "From arrival to the last token")
        self.queue_time = self._seconds("request_queue_time", "From arrival to the first step")
        self.prefill_time = self._seconds("request_prefill_time", "From the first step to the first token")
        self.decode_time = self._seconds("request_decode_time", "From the first token to the last")
        self.prompt_sizes = self._tokens("request_prompt_tokens", "Prompt tokens of a request")
        self.answer_sizes = self._tokens("request_generation_tokens", "Tokens generated for a request")
        self.steps = self._seconds("step_time", "From a step's start to its results", TOKEN_SECONDS)
        self.step_tokens = self._tokens("iteration_tokens", "Tokens in a step, of prompts and decoded")
        self.registry.register(EngineCollector(engine))

    def _counter(self, name: str, text: str, labels: list[str] | None = None) -> Counter:
        return Counter(f"jmoe_{name}", text, labels or (), registry=self.registry)

    def _seconds(self, name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
        return Histogram(f"jmoe_{name}_seconds", text, buckets=buckets, registry=self.registry)

    def _tokens(self, name: str, text: str) -> Histogram:
        return Histogram(f"jmoe_{name}", text, buckets=TOKENS, registry=self.registry)

    # ---- from the engine -----------------------------------------------------------------------------

    def token(self, request: Request, now: float) -> None:
        self.generation_tokens.inc()
        self.totals.generation_tokens += 1
        before = self.last_token.get(request.id)
        if before is None:
            self._prompt_done(request)
            waited = now - request.arrival_time
            self.first_token.observe(waited)
            self.totals.first_token.add(waited)
        else:
            self.token_gap.observe(now - before)
            self.totals.between_tokens.add(now - before)
        self.last_token[request.id] = now

    def stepped(self, report: StepReport) -> None:
        self.steps.observe(report.seconds)
        self.step_tokens.observe(report.prompt_tokens + report.decode_tokens)
        self.totals.step.add(report.seconds)
        self.totals.steps += 1
        self.totals.prompt_tokens += report.prompt_tokens

    def finished(self, request: Request, reason: str) -> None:
        last = self.last_token.pop(request.id, None)
        self.reason_counters[reason].inc()
        if reason not in ("stop", "length"):
            return
        if last is None:  # max_tokens 0: a prompt was scored, no token came
            self._prompt_done(request)
            return
        self.latency.observe(last - request.arrival_time)
        tokens = len(request.token_ids)
        self.answer_sizes.observe(tokens)
        if request.first_token_time is not None:
            took = last - request.first_token_time
            self.decode_time.observe(took)
            if tokens > 1:
                self.mean_token_gap.observe(took / (tokens - 1))

    def _prompt_done(self, request: Request) -> None:
        self.prompt_tokens.inc(len(request.prompt_token_ids))
        self.prompt_sizes.observe(len(request.prompt_token_ids))
        if request.start_time is not None:
            self.queue_time.observe(request.start_time - request.arrival_time)
            if request.first_token_time is not None:
                self.prefill_time.observe(request.first_token_time - request.start_time)

    # ---- from the server -----------------------------------------------------------------------------

    def count_rejection(self, reason: str) -> None:
        """Counts a refused request.

        reason: 503's code, which the server defines.
        """
        self.rejections.labels(reason).inc()
        self.totals.rejected += 1

    def count_answer(self, method: str, status: int, route: str) -> None:
        """Counts an answer.

        route: pattern of the route, never the requested path: clients could make any number of paths.
        """
        self.answers.labels(method if method in METHODS else "other", str(status), route).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)


class EngineCollector(Collector):
    """Gauges and counters of the engine at the moment of a scrape."""

    def __init__(self, engine: EngineProtocol):
        self.engine = engine

    def describe(self) -> list[Metric]:
        return []  # registering must not ask the engine

    def collect(self) -> Iterator[Metric]:
        s = self.engine.snapshot()
        yield GaugeMetricFamily("jmoe_num_requests_running", "Requests in the batch", s.num_running)
        yield GaugeMetricFamily("jmoe_num_requests_waiting", "Requests in the queue", s.num_waiting)
        yield GaugeMetricFamily("jmoe_kv_cache_usage_perc", "KV pages in use, 0 to 1", s.kv_usage)
        late = s.compilations_after_warmup
        yield CounterMetricFamily("jmoe_compilations_after_warmup", "Compilations while serving: 0", late)
        preemptions = "Requests that lost their KV pages to older ones"
        yield CounterMetricFamily("jmoe_num_preemptions", preemptions, s.preemptions)
        lookups = "Prompt tokens looked up in cached KV pages"
        yield CounterMetricFamily("jmoe_prefix_cache_queries", lookups, s.prefix_queries)
        yield CounterMetricFamily("jmoe_prefix_cache_hits", "Those found there", s.prefix_hits)
        redraws = "Tokens that a grammar refused and that were drawn again"
        yield CounterMetricFamily("jmoe_grammar_redraws", redraws, s.grammar_redraws)
        try:
            stats = self.engine.moe_stats()
        except EngineDead:
            return  # the other numbers are still reported
        yield from _moe_metrics(stats)


def _moe_metrics(stats: dict[str, Any]) -> Iterator[Metric]:
    """Yields metrics by layer over both phases: sums, mean active experts per step, and the balance of the
    ranks."""
    active = GaugeMetricFamily(
        "jmoe_moe_active_experts", "Experts with a token, mean a step", labels=["layer"]
    )
    text = "Assignments of the most loaded rank over the mean, since the start"
    balance = GaugeMetricFamily("jmoe_moe_rank_load_max_over_mean", text, labels=["layer"])
    counters = [CounterMetricFamily(name, text, labels=["layer"]) for name, text, _ in MOE_COUNTERS]
    phases = [stats["prefill"], stats["decode"]]
    steps = max(sum(phase["steps"] for phase in phases), 1)
    rows = zip(*(phase["per_layer"] for phase in phases), strict=True)
    counts_LE = np.array([phase["counts"] for phase in phases], np.int64).sum(0)
    load_LR = load_by_rank(counts_LE, rank_of_expert(stats))
    for number, layers, load_R in zip(stats["model"]["moe_layers"], rows, load_LR, strict=True):
        summed = sum(
            layer["active_experts"] * phase["steps"] for layer, phase in zip(layers, phases, strict=True)
        )
        active.add_metric([str(number)], summed / steps)
        balance.add_metric([str(number)], load_R.max() / max(load_R.mean(), 1e-9) if load_R.any() else 1.0)
        for counter, (_, _, key) in zip(counters, MOE_COUNTERS, strict=True):
            counter.add_metric([str(number)], sum(layer[key] for layer in layers))
    yield active
    yield balance
    yield from counters
