"""The OpenAPI document: bodies from the structs that check the requests, answers from ``replies``."""

from dataclasses import dataclass
from typing import Any

import msgspec

from jmoe.server.answer import replies
from jmoe.server.request.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from jmoe.server.wire.middleware import OPEN_PATHS


@dataclass(frozen=True)
class Operation:
    """One route. body, answer: types, None for no body and for an answer that is no JSON of ours but of
    another ``kind``.

    errors: the statuses beside 200 that it may answer with, without 401 and 500.
    """

    summary: str
    answer: type | None
    errors: tuple[int, ...] = ()
    body: type | None = None
    example: dict[str, Any] | None = None
    stream: type | None = None
    kind: str = "text/plain"


GENERATES = (400, 404, 408, 413, 415, 503)
POST = {
    "/v1/completions": Operation(
        "Continue a text or token ids",
        replies.Completion, GENERATES, CompletionRequest,
        {"prompt": "Once upon a time", "max_tokens": 8}, replies.Completion,
    ),
    "/v1/chat/completions": Operation(
        "Answer a conversation",
        replies.ChatCompletion, GENERATES, ChatRequest,
        {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}, replies.ChatCompletionChunk,
    ),
    "/tokenize": Operation(
        "Text to token ids", replies.Tokens, GENERATES, TokenizeRequest, {"prompt": "Hello"}
    ),
    "/detokenize": Operation(
        "Token ids to text", replies.Text, GENERATES, DetokenizeRequest, {"tokens": [1, 2]}
    ),
}  # fmt: skip
# Without /moe/events, which never ends: who tries every operation of the document would wait for it.
GET = {
    "/live": Operation("200 while the engine lives", replies.Status, (503,)),
    "/ready": Operation("200 while new requests are taken", replies.Status, (503,)),
    "/health": Operation("The same as /ready", replies.Status, (503,)),
    "/ping": Operation("The same as /ready", replies.Status, (503,)),
    "/version": Operation("The server's version", replies.Version),
    "/v1/models": Operation("The served models", replies.Models),
    "/v1/models/{id}": Operation("One served model", replies.Model, (404,)),
    "/moe/stats": Operation("What the experts did, by layer and expert", replies.MoEStats, (503,)),
    "/dashboard": Operation("A page that shows it while it happens", None, kind="text/html"),
    "/moe": Operation("The same as /dashboard", None, kind="text/html"),
    "/openapi.json": Operation("This document", dict),
    "/metrics": Operation("Prometheus metrics", None),
}
ERRORS = {
    400: "The request is wrong; param names the field",
    401: "The key is missing or wrong",
    404: "There is no such model",
    408: "The body did not arrive in time",
    413: "The body is too large",
    415: "Content-Type is not application/json, or Content-Encoding is not gzip",
    500: "The server failed; the message has an id to find in its log",
    503: "The queue is full, or the server is stopping",
}


def openapi_document(version: str, model: str, *, with_key: bool) -> dict[str, Any]:
    """A JSON-able OpenAPI 3.1 document of all routes. model: the served one's name."""
    operations = [*GET.values(), *POST.values()]
    kinds = {k for o in operations for k in (o.answer, o.body, o.stream) if k is not None} | {replies.Error}
    ordered = sorted(kinds, key=lambda kind: kind.__name__)
    found, components = msgspec.json.schema_components(ordered, ref_template="#/components/schemas/{name}")
    schemas = dict(zip(ordered, found, strict=True))
    for kind in (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest):
        components[kind.__name__]["properties"]["model"] = {"enum": [None, model], "default": None}
    paths = {path: {"get": _operation(path, o, schemas, model, with_key)} for path, o in GET.items()}
    paths |= {path: {"post": _operation(path, o, schemas, model, with_key)} for path, o in POST.items()}
    document = {"openapi": "3.1.0", "info": {"title": "jmoe", "version": version}, "paths": paths}
    keys = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}} if with_key else {}
    return document | {"components": {"schemas": components, **keys}}


def _operation(
    path: str, operation: Operation, schemas: dict[type, Any], model: str, with_key: bool
) -> dict[str, Any]:
    guarded = with_key and path not in OPEN_PATHS
    error = {"application/json": {"schema": schemas[replies.Error]}}
    statuses = sorted((*operation.errors, 500, 401) if guarded else (*operation.errors, 500))
    responses = {"200": {"description": "OK", "content": _content(operation, schemas)}}
    responses |= {str(s): {"description": ERRORS[s], "content": error} for s in statuses}
    described: dict[str, Any] = {"summary": operation.summary, "responses": responses}
    if guarded:
        described["security"] = [{"key": []}]
    if operation.body is not None:
        content = {"schema": schemas[operation.body], "example": operation.example}
        described["requestBody"] = {"required": True, "content": {"application/json": content}}
    if "{id}" in path:
        text = {"type": "string", "minLength": 1}
        parameter = {"name": "id", "in": "path", "required": True, "schema": text, "example": model}
        described["parameters"] = [parameter]
    return described


def _content(operation: Operation, schemas: dict[type, Any]) -> dict[str, Any]:
    if operation.answer is None:
        return {operation.kind: {"schema": {"type": "string"}}}
    content: dict[str, Any] = {"application/json": {"schema": schemas[operation.answer]}}
    if operation.stream is not None:
        content["text/event-stream"] = {"schema": _event(schemas[operation.stream], schemas[replies.Error])}
    return content


def _event(chunk: Any, error: Any) -> dict[str, Any]:
    """One server-sent event of a stream."""
    json = {
        "type": "string",
        "description": "A chunk, or an error where the answer fails",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [chunk, error]},
    }
    last = {"const": "[DONE]", "description": "In the last event"}
    return {"type": "object", "required": ["data"], "properties": {"data": {"anyOf": [last, json]}}}
