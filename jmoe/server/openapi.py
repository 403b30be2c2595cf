"""The OpenAPI document, its request schemas made from the structs that check the requests."""

from typing import Any

import msgspec

from jmoe.server.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

POST = {
    "/v1/completions": (CompletionRequest, "Continue a text or token ids"),
    "/v1/chat/completions": (ChatRequest, "Answer a conversation"),
    "/tokenize": (TokenizeRequest, "Text to token ids"),
    "/detokenize": (DetokenizeRequest, "Token ids to text"),
}
GET = {
    "/live": "200 while the engine lives",
    "/ready": "200 while new requests are taken",
    "/health": "The same as /ready",
    "/ping": "The same as /ready",
    "/version": "The server's version",
    "/v1/models": "The served models",
    "/v1/models/{id}": "One served model",
    "/moe/stats": "What the experts did, by layer and expert",
    "/moe/events": "What they and the server did in the last seconds, each second",
    "/dashboard": "A page that shows it",
    "/moe": "The same as /dashboard",
    "/openapi.json": "This document",
    "/metrics": "Prometheus metrics",
}
OTHER_KINDS = {
    "/metrics": ["text/plain"],
    "/dashboard": ["text/html"],
    "/moe": ["text/html"],
    "/moe/events": ["text/event-stream"],
    "/v1/completions": ["application/json", "text/event-stream"],
    "/v1/chat/completions": ["application/json", "text/event-stream"],
}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def openapi_document(version: str, *, with_key: bool) -> dict[str, Any]:
    """A JSON-able OpenAPI 3.1 document of all routes."""
    kinds = [kind for kind, _ in POST.values()]
    bodies, schemas = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    paths: dict[str, Any] = {path: {"get": _operation(path, text, None)} for path, text in GET.items()}
    for (path, (_, text)), body in zip(POST.items(), bodies, strict=True):
        paths[path] = {"post": _operation(path, text, body)}
    components: dict[str, Any] = {"schemas": {**schemas, "Error": ERROR}}
    document = {"openapi": "3.1.0", "info": {"title": "jmoe", "version": version}, "paths": paths}
    if with_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document | {"components": components}


def _operation(path: str, summary: str, body: dict | None) -> dict[str, Any]:
    kinds = OTHER_KINDS.get(path, ["application/json"])
    error = {"$ref": "#/components/schemas/Error"}
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {
            "200": {"description": "OK", "content": {kind: {} for kind in kinds}},
            "default": {"description": "Error", "content": {"application/json": {"schema": error}}},
        },
    }
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    if "{id}" in path:
        text = {"type": "string", "minLength": 1}
        operation["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": text}]
    return operation
