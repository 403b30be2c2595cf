"""One OpenTelemetry span for each answer of a route that has an operation name.

The attributes are those of the GenAI semantic conventions, which are still in development: their names are
only in this file; the names of operations are in the routes. No span contains a prompt or an answer.
"""
# pyright: reportMissingImports=false

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from jmoe import __version__
from jmoe.engine.request import Request
from jmoe.server.watch.answered import Answered

Attribute = str | int | float | list[str]


def exporting_to(endpoint: str) -> SpanProcessor:
    """A processor that sends spans in batches from its own thread. ValueError if ``endpoint`` is no http(s)
    URL."""
    if not endpoint.startswith(("http://", "https://")):
        raise ValueError(f"--otlp-traces-endpoint takes a URL, http://host:4318/v1/traces, got {endpoint!r}")
    return BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint))


class Tracer:
    """An observer of answers. model: the served model's name."""

    def __init__(self, processor: SpanProcessor, model: str):
        self.model = model
        self.provider = TracerProvider(
            resource=Resource.create({"service.name": "jmoe", "service.version": __version__})
        )
        self.provider.add_span_processor(processor)
        self.tracer = self.provider.get_tracer("jmoe", __version__)
        self.propagator = TraceContextTextMapPropagator()

    def __call__(self, answered: Answered) -> None:
        operation = answered.route.operation
        if operation is None:
            return
        started = answered.ended - answered.seconds
        span = self.tracer.start_span(
            f"{operation} {self.model}",
            self.propagator.extract(answered.headers),  # the caller's span is the parent
            SpanKind.SERVER,
            self._attributes(answered, operation),
            start_time=int(started * 1e9),
        )
        if answered.status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end(int(answered.ended * 1e9))

    def _attributes(self, answered: Answered, operation: str) -> dict[str, Attribute]:
        attributes: dict[str, Attribute] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "jmoe",
            "gen_ai.request.model": self.model,
            "http.request.method": answered.method,
            "http.route": answered.route.pattern,
            "http.response.status_code": answered.status,
            "jmoe.request_id": answered.request_id,
        }
        generation = answered.generation
        if generation is None:
            return attributes
        requests = generation.requests
        return (
            attributes
            | _asked(requests[0], len(requests))
            | _times(requests[0])
            | {
                "gen_ai.response.id": requests[0].id.rpartition("-")[0],
                "gen_ai.response.model": self.model,
                "gen_ai.response.finish_reasons": [generation.reasons.get(r.id, "abort") for r in requests],
                "gen_ai.usage.input_tokens": answered.prompt_tokens,
                "gen_ai.usage.output_tokens": answered.generated_tokens,
            }
        )

    def close(self) -> None:
        """Sends the remaining spans; it may wait some seconds for the collector."""
        self.provider.shutdown()


def _asked(request: Request, choices: int) -> dict[str, Attribute]:
    params = request.params
    asked: dict[str, Attribute | None] = {
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k,
        "gen_ai.request.seed": params.seed,
        "gen_ai.request.choice.count": choices,
    }
    return {name: value for name, value in asked.items() if value is not None}


def _times(request: Request) -> dict[str, Attribute]:
    """Times of the first choice in seconds, as far as it got."""
    if request.started is None:
        return {}
    times: dict[str, Attribute] = {"gen_ai.latency.time_in_queue": request.started - request.arrived}
    if request.first_token is not None:
        times["gen_ai.latency.time_in_model_prefill"] = request.first_token - request.started
        times["gen_ai.server.time_to_first_token"] = request.first_token - request.arrived
    return times
