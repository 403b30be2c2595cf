"""Tests GET /metrics: which names it has, and what they count."""

import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.server.fake_engine import ByteCodec, FakeEngine, eventually, served

from jmoe.engine.reports import EngineSnapshot, StepReport

NAMES = {
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions",
    "prefix_cache_queries", "prefix_cache_hits", "grammar_redraws", "prompt_tokens", "generation_tokens",
    "request_success",
    "admission_rejections", "http_requests", "time_to_first_token_seconds", "inter_token_latency_seconds",
    "request_time_per_output_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds",
    "request_prefill_time_seconds", "request_decode_time_seconds", "request_prompt_tokens",
    "request_generation_tokens", "step_time_seconds", "iteration_tokens", "compilations_after_warmup",
    "moe_active_experts", "moe_rank_load_max_over_mean", "moe_assignments", "moe_dropped_assignments",
    "moe_rerouted_assignments", "moe_remapped_assignments", "moe_lost_assignments", "moe_remote_assignments",
    "moe_transport_bytes", "moe_transport_useful_bytes", "moe_expert_cache_hits", "moe_expert_cache_misses",
    "moe_expert_cache_evictions", "moe_prefetch_bytes", "moe_prefetch_useful_bytes",
}  # fmt: skip
GRAFANA = Path(__file__).parents[3] / "configs/grafana/jmoe.json"


def families(client) -> dict:
    return {f.name: f for f in text_string_to_metric_families(client.get("/metrics").text)}


def value(client, sample: str, **labels: str) -> float:
    found = (s for f in families(client).values() for s in f.samples)
    return next((s.value for s in found if s.name == sample and labels.items() <= s.labels.items()), 0.0)


@pytest.fixture
def client():
    with served(FakeEngine(ByteCodec(), room=4)) as client:
        yield client


def test_every_metric_is_there_and_explained(client):
    found = {name: family for name, family in families(client).items() if not name.endswith("_created")}
    assert set(found) == {f"jmoe_{name}" for name in NAMES}
    assert all(family.documentation for family in found.values())


def test_labels_are_few(client):
    client.post("/v1/completions", json={"prompt": "ab", "max_tokens": 2})
    labels = {label for f in families(client).values() for s in f.samples for label in s.labels}
    assert labels == {"le", "layer", "finished_reason", "method", "status", "handler"}


def test_a_request_is_measured_in_all_its_parts(client):
    client.post("/v1/completions", json={"prompt": [97, 98, 99], "max_tokens": 5})
    for name in ("request_prefill_time_seconds", "request_decode_time_seconds", "request_prompt_tokens",
                 "request_generation_tokens", "request_time_per_output_token_seconds"):  # fmt: skip
        assert eventually(lambda name=name: value(client, f"jmoe_{name}_count") == 1), name
    assert value(client, "jmoe_request_prompt_tokens_sum") == 3
    assert value(client, "jmoe_request_generation_tokens_sum") == 5
    parts = sum(value(client, f"jmoe_request_{p}_time_seconds_sum") for p in ("queue", "prefill", "decode"))
    assert parts == pytest.approx(value(client, "jmoe_e2e_request_latency_seconds_sum"), abs=1e-6)


def test_steps_are_counted(client):
    client.service.metrics.stepped(StepReport(100, 4, 0.02, 0.001))
    client.service.metrics.stepped(StepReport(0, 4, 0.01, 0.001))
    assert (
        value(client, "jmoe_iteration_tokens_sum") == 108
        and value(client, "jmoe_iteration_tokens_count") == 2
    )
    assert value(client, "jmoe_step_time_seconds_sum") == pytest.approx(0.03)


def test_what_the_snapshot_tells(client):
    client.service.engine.snapshot = lambda: EngineSnapshot(1, 2, 0.5, True, 3, 4, 50, 6, 7)
    names = ("compilations_after_warmup_total", "num_preemptions_total", "prefix_cache_queries_total",
             "prefix_cache_hits_total", "grammar_redraws_total")  # fmt: skip
    assert [value(client, f"jmoe_{name}") for name in names] == [3, 4, 50, 6, 7]


def test_answers_are_counted_by_pattern_and_never_by_path(client):
    client.get("/v1/models/fake")
    client.get("/v1/models/another")
    client.get("/no/such/thing")
    client.delete("/v1/models")
    client.request("BREW", "/version")
    totals = [s for s in families(client)["jmoe_http_requests"].samples if s.name.endswith("_total")]
    answers = {(s.labels["method"], s.labels["status"], s.labels["handler"]): s.value for s in totals}
    expected = {
        ("GET", "200", "/v1/models/{id}"): 1, ("GET", "404", "/v1/models/{id}"): 1,
        ("GET", "404", "unknown"): 1, ("DELETE", "405", "/v1/models"): 1, ("other", "405", "/version"): 1,
    }  # fmt: skip
    assert answers == expected


def test_a_wrong_key_is_counted_without_its_path():
    with served(FakeEngine(), api_key="k") as client:
        client.get("/v1/models/secret")
        client.headers["authorization"] = "Bearer k"
        assert value(client, "jmoe_http_requests_total", status="401", handler="unknown") == 1


def test_refusals_are_counted_by_reason(client):
    for n in (5, 5, 1):  # there is room for four
        client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, "n": n})
    assert value(client, "jmoe_admission_rejections_total", reason="queue_full") == 2
    client.service.is_draining = True
    client.post("/v1/completions", json={"prompt": "a"})
    assert value(client, "jmoe_admission_rejections_total", reason="draining") == 1


def test_ranks_balance(client):
    """The balance of ranks counts assignments on their experts.

    The experts are on ranks 0, 0, 1, 1. Layer 0 has 6, 2, 2, 2 assignments on them, layer 1 has 10, 0, 1, 1.
    """
    assert value(client, "jmoe_moe_rank_load_max_over_mean", layer="0") == pytest.approx(8 / 6)
    assert value(client, "jmoe_moe_rank_load_max_over_mean", layer="1") == pytest.approx(10 / 6)


def test_ranks_balance_under_a_placement(client):
    stats = client.service.engine.moe_stats()
    client.service.engine.moe_stats = lambda: stats | {"placement": [[0, 1, 0, 1], [0, 1, 1, 1]]}
    assert value(client, "jmoe_moe_rank_load_max_over_mean", layer="0") == pytest.approx(8 / 6)
    assert value(client, "jmoe_moe_rank_load_max_over_mean", layer="1") == pytest.approx(10 / 6)
    client.service.engine.moe_stats = lambda: stats | {"placement": [[0, 1, 1, 1], [1, 0, 0, 1]]}
    assert value(client, "jmoe_moe_rank_load_max_over_mean", layer="0") == pytest.approx(1)
    assert value(client, "jmoe_moe_rank_load_max_over_mean", layer="1") == pytest.approx(11 / 6)


def test_the_grafana_file_asks_for_metrics_that_exist(client):
    client.post("/v1/completions", json={"prompt": "ab", "max_tokens": 2})
    known = {s.name for f in families(client).values() for s in f.samples}
    known |= {"jmoe_admission_rejections_total"}  # it appears at the first refusal
    board = json.loads(GRAFANA.read_text(encoding="utf-8"))
    targets = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    assert len(targets) > 20
    for expr in targets:
        asked = set(re.findall(r"jmoe_\w+", expr))
        assert asked and asked <= known, expr
