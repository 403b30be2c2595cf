"""The metrics that are requested from the engine at each scrape."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jmoe.config.counters import COUNTERS
from jmoe.engine.request import EngineDead
from jmoe.server.engine_api import EngineProtocol
from jmoe.server.watch.ranks import load_by_rank, rank_of_expert

MOE_COUNTERS = [(c.metric, c.text, c.name) for c in COUNTERS if c.metric is not None]


class EngineCollector(Collector):
    """Gauges and counters of the engine at the moment of a scrape."""

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
        preempted = "Requests that lost their KV pages to older ones"
        yield CounterMetricFamily("jmoe_num_preemptions", preempted, s.preemptions)
        asked = "Prompt tokens looked up in cached KV pages"
        yield CounterMetricFamily("jmoe_prefix_cache_queries", asked, s.prefix_queries)
        yield CounterMetricFamily("jmoe_prefix_cache_hits", "Those found there", s.prefix_hits)
        try:
            stats = self.engine.moe_stats()
        except EngineDead:
            return  # the other numbers are still reported
        yield from _moe_metrics(stats)


def _moe_metrics(stats: dict[str, Any]) -> Iterator[Metric]:
    """Metrics by layer over both phases: sums, mean active experts per step, and the balance of the ranks."""
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
