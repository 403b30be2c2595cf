"""Each answer has one span, whose parent is the caller's span, and no span contains a user's text."""

import pytest

pytest.importorskip("opentelemetry.sdk", reason="needs the otel extra")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the otel extra")

from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from support.server.fake_engine import ByteCodec, FakeEngine, served

from jmoe.server.watch.tracing import Tracer, span_exporter

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def traced():
    """Yields (client, a function that returns the spans up to now)."""
    memory = InMemorySpanExporter()
    with served(FakeEngine(ByteCodec())) as client:
        client.service.observers.append(Tracer(SimpleSpanProcessor(memory), "fake"))
        yield client, memory.get_finished_spans


def test_a_completion_is_a_span(traced):
    client, spans = traced
    body = {"prompt": "hush", "max_tokens": 3, "n": 2, "temperature": 0.5, "top_p": 0.9, "seed": 7}
    answer = client.post("/v1/completions", json=body, headers={"x-request-id": "r1"}).json()
    (span,) = spans()
    assert span.name == "text_completion fake" and span.kind == SpanKind.SERVER and span.parent is None
    expected = {
        "gen_ai.operation.name": "text_completion", "gen_ai.request.model": "fake",
        "gen_ai.response.model": "fake", "gen_ai.request.max_tokens": 3, "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.seed": 7, "gen_ai.request.choice.count": 2, "gen_ai.response.id": answer["id"],
        "gen_ai.response.finish_reasons": ("length", "length"), "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 6, "http.response.status_code": 200, "jmoe.request_id": "r1",
    }  # fmt: skip
    assert expected.items() <= dict(span.attributes).items()
    assert 0 <= span.attributes["gen_ai.latency.time_in_queue"] < 5
    assert span.end_time > span.start_time
    assert "hush" not in span.to_json()


def test_the_callers_span_is_the_parent(traced):
    client, spans = traced
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers=headers)
    client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers={"traceparent": "nonsense"})
    first, second = spans()
    assert f"{first.context.trace_id:032x}" == TRACE and f"{first.parent.span_id:016x}" == PARENT
    assert second.parent is None


def test_refusals_and_streams_are_spans_and_nothing_else_is(traced):
    client, spans = traced
    client.get("/v1/models")
    client.post("/v1/completions", json={"prompt": "a", "max_tokens": -2})
    client.post("/v1/completions", json={"prompt": "ab", "max_tokens": 4, "stream": True})
    client.service.is_draining = True
    client.post("/v1/completions", json={"prompt": "a"})
    bad, streamed, refused = spans()
    assert bad.attributes["http.response.status_code"] == 400 and bad.status.status_code == StatusCode.UNSET
    assert streamed.attributes["gen_ai.usage.output_tokens"] == 4
    assert refused.attributes["http.response.status_code"] == 503
    assert refused.status.status_code == StatusCode.ERROR


def test_a_wrong_address_is_one_line():
    with pytest.raises(ValueError, match="takes a URL"):
        span_exporter("localhost:4318")
