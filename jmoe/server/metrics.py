"""Prometheus metrics of one server, in a registry of its own."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jmoe.engine.request import EngineDead, Request, StepReport
from jmoe.server.engine_api import EngineProtocol

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5, 10, 20, 40, 80, 160, 640, 2560)
# Half a millisecond is a decode step of a small model: coarser buckets would hide it.
TOKEN_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 1, 2, 5)
REASONS = ("stop", "length", "abort", "error")


class Metrics:
    """An engine listener that counts, and the text of ``GET /metrics``.

    ``token`` and ``finished`` are called from the engine's thread only, so the times of the last tokens
    need no lock.
    """

    def __init__(self, engine: EngineProtocol):
        self.registry = CollectorRegistry()
        self.last_token: dict[str, float] = {}
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens processed")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated")
        self.requests = self._counter("request_success", "Requests ended, by reason", ["finished_reason"])
        self.by_reason = {reason: self.requests.labels(reason) for reason in REASONS}
        self.first = self._seconds("time_to_first_token", "From arrival to the first token")
        self.between = self._seconds("inter_token_latency", "Between two tokens of a request", TOKEN_SECONDS)
        self.whole = self._seconds("e2e_request_latency", "From arrival to the last token")
        self.queued = self._seconds("request_queue_time", "From arrival to the first step")
        self.steps = self._seconds("step_time", "From a step's start to its results", TOKEN_SECONDS)
        self.registry.register(EngineCollector(engine))

    def _counter(self, name: str, text: str, labels: list[str] | None = None) -> Counter:
        return Counter(f"jmoe_{name}", text, labels or (), registry=self.registry)

    def _seconds(self, name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
        return Histogram(f"jmoe_{name}_seconds", text, buckets=buckets, registry=self.registry)

    def token(self, request: Request, now: float) -> None:
        self.generation_tokens.inc()
        before = self.last_token.get(request.id)
        if before is None:
            self._prompt_done(request)
            self.first.observe(now - request.arrived)
        else:
            self.between.observe(now - before)
        self.last_token[request.id] = now

    def stepped(self, report: StepReport) -> None:
        self.steps.observe(report.seconds)

    def finished(self, request: Request, reason: str) -> None:
        last = self.last_token.pop(request.id, None)
        self.by_reason[reason].inc()
        if reason in ("stop", "length"):
            if last is None:  # max_tokens 0: a prompt was scored, no token came
                self._prompt_done(request)
            else:
                self.whole.observe(last - request.arrived)

    def _prompt_done(self, request: Request) -> None:
        self.prompt_tokens.inc(len(request.prompt_token_ids))
        if request.started is not None:
            self.queued.observe(request.started - request.arrived)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class EngineCollector(Collector):
    """What the engine is asked for at each scrape."""

    def __init__(self, engine: EngineProtocol):
        self.engine = engine

    def describe(self) -> list[Metric]:
        return []  # registering must not ask the engine

    def collect(self) -> Iterator[Metric]:
        s = self.engine.snapshot()
        yield GaugeMetricFamily("jmoe_num_requests_running", "Requests in the batch", s.running)
        yield GaugeMetricFamily("jmoe_num_requests_waiting", "Requests in the queue", s.waiting)
        yield GaugeMetricFamily("jmoe_kv_cache_usage_perc", "KV pages in use, 0 to 1", s.kv_usage)
        compiled = s.compilations_after_warmup
        yield CounterMetricFamily("jmoe_compilations_after_warmup", "Compilations while serving: 0", compiled)
        try:
            stats = self.engine.moe_stats()
        except EngineDead:
            return  # the other numbers still tell what happened
        yield from _moe_metrics(stats)


MOE_COUNTERS = (  # metric, its text, the key in a layer's statistics
    ("jmoe_moe_assignments", "Tokens sent to experts", "assignments"),
    ("jmoe_moe_remapped_assignments", "Those that binning gave to another expert", "remapped"),
    ("jmoe_moe_dropped_assignments", "Those that no expert computed", "dropped"),
    ("jmoe_moe_rerouted_assignments", "Those to another expert than chosen, for room", "rerouted"),
    ("jmoe_moe_remote_assignments", "Those to another rank's experts", "remote_assignments"),
    ("jmoe_moe_transport_bytes", "Between ranks, both ways, padding included", "transport_bytes"),
    ("jmoe_moe_transport_useful_bytes", "Those that the routing needed", "transport_useful_bytes"),
    ("jmoe_moe_expert_cache_hits", "Experts needed that were on the device", "expert_cache_hits"),
    ("jmoe_moe_expert_cache_misses", "Those that were in host memory", "expert_cache_misses"),
    ("jmoe_moe_expert_cache_evictions", "Experts that gave way to others", "expert_cache_evictions"),
    ("jmoe_moe_prefetch_bytes", "Experts copied before they were needed", "prefetch_bytes"),
    ("jmoe_moe_prefetch_useful_bytes", "Those of them that were used", "prefetch_useful_bytes"),
)


def _moe_metrics(stats: dict[str, Any]) -> Iterator[Metric]:
    """By layer, over both phases: sums, and the mean a step of the active experts."""
    active = GaugeMetricFamily(
        "jmoe_moe_active_experts", "Experts with a token, mean a step", labels=["layer"]
    )
    counters = [CounterMetricFamily(name, text, labels=["layer"]) for name, text, _ in MOE_COUNTERS]
    phases = [stats["prefill"], stats["decode"]]
    steps = max(sum(phase["steps"] for phase in phases), 1)
    rows = zip(*(phase["per_layer"] for phase in phases), strict=True)
    for number, layers in zip(stats["model"]["moe_layers"], rows, strict=True):
        summed = sum(
            layer["active_experts"] * phase["steps"] for layer, phase in zip(layers, phases, strict=True)
        )
        active.add_metric([str(number)], summed / steps)
        for counter, (_, _, key) in zip(counters, MOE_COUNTERS, strict=True):
            counter.add_metric([str(number)], sum(layer[key] for layer in layers))
    yield active
    yield from counters
