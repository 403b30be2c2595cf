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


def span_exporter(endpoint: str) -> SpanProcessor:
    """Returns a processor that sends spans in batches from its own thread. It raises ValueError if
    ``endpoint`` is no http(s) URL."""
    if not endpoint.startswith(("http://", "https://")):
        raise ValueError(f"--otlp-traces-endpoint takes a URL, http://host:4318/v1/traces, got {endpoint!r}")
    return BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint))


class Tracer:
    """An observer of answers.

    model: served model's name.
    """

    def __init__(self, processor: SpanProcessor, model: str):
        self.model = model
        self.provider = TracerProvider(
            resource=Resource.create({"service.name": "jmoe", "service.version": __version__})
        )
        self.provider.add_span_processor(processor)
        self.tracer = self.provider.get_tracer("jmoe", __version__)
        self.propagator = TraceContextTextMapPropagator()

    def __call__(self, answer: Answered) -> None:
        operation = None if answer.route is None else answer.route.operation
        if operation is None:
            return
        start = answer.end_time - answer.seconds
        span = self.tracer.start_span(
            f"{operation} {self.model}",
            self.propagator.extract(answer.headers),  # the caller's span is the parent
            SpanKind.SERVER,
            self._attributes(answer, operation),
            start_time=int(start * 1e9),
        )
        if answer.status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end(int(answer.end_time * 1e9))

    def _attributes(self, answer: Answered, operation: str) -> dict[str, Attribute]:
        attributes: dict[str, Attribute] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "jmoe",
            "gen_ai.request.model": self.model,
            "http.request.method": answer.method,
            "http.route": answer.pattern,
            "http.response.status_code": answer.status,
            "jmoe.request_id": answer.request_id,
        }
        generation = answer.generation
        if generation is None:
            return attributes
        requests = generation.requests
        return (
            attributes
            | _request_attributes(requests[0], len(requests))
            | _times(requests[0])
            | {
                "gen_ai.response.id": requests[0].id.rpartition("-")[0],
                "gen_ai.response.model": self.model,
                "gen_ai.response.finish_reasons": [
                    generation.finish_reasons.get(r.id, "abort") for r in requests
                ],
                "gen_ai.usage.input_tokens": answer.prompt_tokens,
                "gen_ai.usage.output_tokens": answer.answer_tokens,
            }
        )

    def close(self) -> None:
        """Sends the remaining spans; it may wait some seconds for the collector."""
        self.provider.shutdown()


def _request_attributes(request: Request, choices: int) -> dict[str, Attribute]:
    params = request.params
    attributes: dict[str, Attribute | None] = {
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k,
        "gen_ai.request.seed": params.seed,
        "gen_ai.request.choice.count": choices,
    }
    return {name: value for name, value in attributes.items() if value is not None}


def _times(request: Request) -> dict[str, Attribute]:
    """Returns the times of the first choice in seconds, as far as it got."""
    if request.start_time is None:
        return {}
    times: dict[str, Attribute] = {"gen_ai.latency.time_in_queue": request.start_time - request.arrival_time}
    if request.first_token_time is not None:
        times["gen_ai.latency.time_in_model_prefill"] = request.first_token_time - request.start_time
        times["gen_ai.server.time_to_first_token"] = request.first_token_time - request.arrival_time
    return times
